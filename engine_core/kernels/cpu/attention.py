"""The entry to compiled attention over the paged cache."""

from __future__ import annotations

import jax
import numpy as np

_DIM_ALIGN = 32  # two vectors of the widest kind
_MAX_GROUP = 64  # query heads per KV head


def attends(q: jax.Array, layer_cache: jax.Array) -> bool:
    """Whether the kernel can do it; see `attend`."""
    kv_heads = layer_cache.shape[2] * layer_cache.shape[3] // 2
    if layer_cache.dtype.itemsize == 1:
        return False
    return q.shape[2] == layer_cache.shape[4] and q.shape[2] % _DIM_ALIGN == 0 and q.shape[1] <= _MAX_GROUP * kv_heads


def attend(
    q: jax.Array,
    layer_cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    window: jax.Array,
    *,
    scale: float,
    target: str,
) -> jax.Array:
    """Attend with packed rows of several sequences; see `kernels.paged_attention.api`.

    Args:
        q: [T, N, H] f32 or bf16. T == B means decode: one token for each sequence, cu_q_lens is not read.
        layer_cache: [num_pages, *page_shape]; f32, or bfloat16 as uint16 where q is bf16. H is not padded.
        kv_lens: [B] i32, 0 is padding.
        page_table: [B, P] i32.
        cu_q_lens: [B + 1] i32.
        window: [] i32, tokens that a query sees; 0: all.
        scale: of the scores.
        target: the kernel's name in XLA.

    Returns:
        [T, N, H] in q's dtype, zeros in padding rows.
    """
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(q.shape, q.dtype))
    out: jax.Array = call(q, layer_cache, kv_lens, page_table, cu_q_lens, window, scale=np.float32(scale))
    return out
