"""The entry to paged attention: checks shapes, chooses an implementation, writes keys and values.

Call it on local arrays: under tensor parallelism inside `jax.shard_map`, each device with its own heads.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from engine_core.kernels.paged_attention import reference, xla
from engine_core.kernels.shapes import check_shapes
from engine_core.kv_cache import pack_heads, to_storage

Implementation = Literal["auto", "reference", "xla"]


def write_kv(layer_cache: jax.Array, k: jax.Array, v: jax.Array, page_ids: jax.Array, offsets: jax.Array) -> jax.Array:
    """Put the keys and values of this step's tokens in their places.

    Args:
        layer_cache: [num_pages, *page_shape]; updated in place where the caller donates it.
        k: [T, K, H], after rotary embedding.
        v: [T, K, H].
        page_ids: [T] i32; out of range (padding): dropped.
        offsets: [T] i32, place in the page, [0, page_size).

    Returns:
        The cache. No two rows may name the same place.
    """
    check_shapes("T K H", k, "T K H", v, "T", page_ids, "T", offsets)
    heads = jnp.stack([k, v], axis=2).reshape(k.shape[0], 2 * k.shape[1], k.shape[2])
    packed = to_storage(pack_heads(heads, layer_cache.shape[2:]), layer_cache.dtype)
    return layer_cache.at[page_ids, offsets].set(packed, mode="drop", wrap_negative_indices=False)


def ragged_paged_attention(
    q: jax.Array,
    layer_cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    *,
    scale: float,
    window: int | jax.Array,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Causal attention of packed query rows over the pages of their sequences.

    Query token j of sequence row b, the j-th of its q_len = cu_q_lens[b + 1] - cu_q_lens[b], sits at position
    kv_lens[b] - q_len + j and sees positions up to its own, the last `window` of them where window > 0.

    T == B means decode: one token row per sequence row, cu_q_lens is not read. A decode row's result is bitwise
    independent of its neighbours, its row and the length of the page table.

    Args:
        q: [T, N, H], sequence rows packed one after the other; rows from cu_q_lens[B] on are padding.
        layer_cache: [num_pages, *page_shape]; places that no query sees may hold anything, NaN too.
        kv_lens: [B] i32, tokens in the cache, this step's included; 0 is padding.
        page_table: [B, P] i32, page ids in order; anything beyond the last used page.
        cu_q_lens: [B + 1] i32, cumulative query lengths.
        scale: of the scores, H ** -0.5 as a rule.
        window: tokens that a query sees, itself included; 0: all. Data where layers are scanned.
        implementation: "auto" chooses by platform.

    Returns:
        [T, N, H] in q's dtype; zeros in padding rows.

    Raises:
        ValueError: shapes do not fit.
    """
    check_shapes("T N H", q, "B", kv_lens, "B P", page_table)
    if cu_q_lens.shape != (kv_lens.shape[0] + 1,):
        raise ValueError(f"[B + 1]: cu_q_lens has shape {cu_q_lens.shape} but B is {kv_lens.shape[0]}")
    num_kv_heads = layer_cache.shape[2] * layer_cache.shape[3] // 2
    if q.shape[1] % num_kv_heads or q.shape[2] > layer_cache.shape[4]:
        raise ValueError(f"[T N H]: {q.shape} does not fit a cache of {num_kv_heads} heads of {layer_cache.shape[4]}")
    decode = q.shape[0] == kv_lens.shape[0]
    if implementation == "reference":
        if decode:
            cu_q_lens = jnp.arange(q.shape[0] + 1, dtype=jnp.int32)
        return reference.ragged_paged_attention(
            q, layer_cache, kv_lens, page_table, cu_q_lens, scale=scale, window=window
        )
    window = jnp.asarray(window, jnp.int32)
    if decode:
        return xla.decode(q, layer_cache, kv_lens, page_table, window, scale=scale)
    return xla.prefill(q, layer_cache, kv_lens, page_table, cu_q_lens, window, scale=scale)
