"""Attention of query tokens over a paged KV cache: `api` chooses, `reference` defines, `xla` and `tpu_*` run."""

from engine_core.kernels.paged_attention.api import Implementation, check_supported, paged_attention, write_kv
from engine_core.kernels.paged_attention.rows import Rows, Scoring
from engine_core.kernels.paged_attention.tuned import TuningKey

__all__ = ["Implementation", "Rows", "Scoring", "TuningKey", "check_supported", "paged_attention", "write_kv"]
