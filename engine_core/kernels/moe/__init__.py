"""Mixture of experts: `router` picks experts, `grouped` runs sorted rows, `fused` all experts, `exchange` moves rows."""
