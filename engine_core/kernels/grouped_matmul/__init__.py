"""Products of sorted rows with their group's matrix: `api` chooses, `reference` defines, `xla` runs everywhere."""

from engine_core.kernels.grouped_matmul.api import Implementation, grouped_matmul

__all__ = ["Implementation", "grouped_matmul"]
