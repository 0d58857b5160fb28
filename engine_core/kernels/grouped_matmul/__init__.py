"""Products of sorted rows with their group's matrix: `api` chooses, `reference` defines, `tpu` and `xla` run."""

from engine_core.kernels.grouped_matmul.api import Implementation, check_supported, grouped_matmul

__all__ = ["Implementation", "check_supported", "grouped_matmul"]
