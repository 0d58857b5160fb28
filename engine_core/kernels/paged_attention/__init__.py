"""Attention of query tokens over a paged KV cache: `api` chooses, `reference` defines, `xla` runs on CPU and GPU."""

from engine_core.kernels.paged_attention.api import ragged_paged_attention, write_kv

__all__ = ["ragged_paged_attention", "write_kv"]
