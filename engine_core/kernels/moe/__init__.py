"""Mixture of experts: `router` picks experts, `grouped` runs sorted rows, `fused` everything, `exchange` moves rows."""
