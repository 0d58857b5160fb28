"""The definition of ragged paged attention that every implementation is tested against. Slow on purpose."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine_core.kv_cache import from_storage


def ragged_paged_attention(
    q: jax.Array,
    layer_cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    *,
    scale: float,
    window: int | jax.Array,
) -> jax.Array:
    """Causal softmax(q k^T * scale) v in float32, one token row at a time; see `api.ragged_paged_attention`."""
    num_rows, _, head_dim = q.shape
    num_pages, page_size = layer_cache.shape[:2]
    heads = from_storage(layer_cache).reshape(num_pages, page_size, -1, layer_cache.shape[-1])[..., :head_dim]
    heads = heads.astype(jnp.float32)

    def attend(token_row: jax.Array, query: jax.Array) -> jax.Array:
        row = jnp.clip(jnp.searchsorted(cu_q_lens, token_row, side="right") - 1, 0, kv_lens.shape[0] - 1)
        position = kv_lens[row] - (cu_q_lens[row + 1] - token_row)
        places = jnp.arange(page_table.shape[1] * page_size)
        visible = (places <= position) & (places < kv_lens[row]) & ((window == 0) | (places > position - window))
        visible &= token_row < cu_q_lens[-1]
        kv = heads.at[page_table[row]].get(mode="clip").reshape(places.size, -1, 2, head_dim)  # [S, K, 2, H]
        kv = jnp.where(visible[:, None, None, None], kv, 0)
        groups = query.astype(jnp.float32).reshape(kv.shape[1], -1, head_dim)  # [K, N / K, H]
        scores = jnp.einsum("kgh,skh->kgs", groups, kv[:, :, 0], precision="highest") * scale
        scores = jnp.where(visible, scores, -jnp.inf)
        weights = jnp.exp(scores - jnp.where(visible.any(), scores.max(-1, keepdims=True), 0))
        total = jnp.where(visible.any(), weights.sum(-1, keepdims=True), 1)
        out = jnp.einsum("kgs,skh->kgh", weights / total, kv[:, :, 1], precision="highest")
        return out.reshape(query.shape).astype(q.dtype)

    return jax.vmap(attend)(jnp.arange(num_rows), q)
