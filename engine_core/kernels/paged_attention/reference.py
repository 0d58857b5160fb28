"""The definition of ragged paged attention that every implementation is tested against. Slow on purpose."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine_core.kernels.paged_attention.rows import Rows, Scoring, quantized
from engine_core.kv_cache import from_storage, pack_heads, to_storage


def paged_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: jax.Array, layer: jax.Array | int, rows: Rows, scoring: Scoring
) -> tuple[jax.Array, jax.Array]:
    """Write this step's keys and values, then attend in float32, one token row at a time; see `api.paged_attention`.

    With s = scale * k_scale * (query . key), capped to soft_cap * tanh(s / soft_cap) where there is a cap, a query's
    result is v_scale * sum(exp(s) * value) / (exp(sink) + sum(exp(s))) over the places that it sees.
    """
    here = rows.at_layer(layer, *cache.shape[:2])
    pages = write(cache.reshape(-1, *cache.shape[2:]), k, v, here, scoring)
    return attend(q, k.shape[1], pages, here, scoring), pages.reshape(cache.shape)


def write(pages: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, scoring: Scoring) -> jax.Array:
    """Put the keys and values of this step's tokens in their places; see `api.write_kv`."""
    sides = [quantized(k, scoring.k_scale, pages.dtype), quantized(v, scoring.v_scale, pages.dtype)]
    heads = jnp.stack(sides, axis=2).reshape(k.shape[0], 2 * k.shape[1], k.shape[2])
    slots = pages.shape[2] * pages.shape[3]
    heads = jnp.pad(heads, ((0, 0), (0, slots - heads.shape[1]), (0, 0)))
    packed = to_storage(pack_heads(heads, pages.shape[2:]), pages.dtype)
    return pages.at[rows.page_ids, rows.offsets].set(packed, mode="drop", wrap_negative_indices=False)


def attend(q: jax.Array, num_kv_heads: int, pages: jax.Array, rows: Rows, scoring: Scoring) -> jax.Array:
    """[T, N, H] over a cache that holds this step's tokens, `[num_pages, *page_shape]`."""
    num_rows, num_heads, head_dim = q.shape
    num_pages, page_size = pages.shape[:2]
    decode = num_rows == rows.kv_lens.shape[0]
    cu_q_lens = jnp.arange(num_rows + 1, dtype=jnp.int32) if decode else rows.cu_q_lens
    heads = from_storage(pages).reshape(num_pages, page_size, -1, pages.shape[-1])[..., :head_dim].astype(jnp.float32)
    heads = heads[:, :, : 2 * num_kv_heads]
    k_scale, v_scale = (1.0 if scale is None else scale for scale in (scoring.k_scale, scoring.v_scale))
    sinks = jnp.full(num_heads, -jnp.inf) if scoring.sinks is None else scoring.sinks.astype(jnp.float32)

    def visible(token_row: jax.Array, row: jax.Array, position: jax.Array, places: jax.Array) -> jax.Array:
        window = jnp.asarray(scoring.window).reshape(())
        seen = (places <= position) & (places < rows.kv_lens[row]) & ((window == 0) | (places > position - window))
        if scoring.custom_mask is not None:
            context = rows.kv_lens[row] - (cu_q_lens[row + 1] - cu_q_lens[row])
            chosen = scoring.custom_mask[token_row].at[places - context].get(mode="fill", fill_value=False)
            seen &= (places < context) | chosen
        return seen & (token_row < cu_q_lens[-1])

    def one(token_row: jax.Array, query: jax.Array) -> jax.Array:
        row = jnp.clip(jnp.searchsorted(cu_q_lens, token_row, side="right") - 1, 0, rows.kv_lens.shape[0] - 1)
        position = rows.kv_lens[row] - (cu_q_lens[row + 1] - token_row)
        places = jnp.arange(rows.page_table.shape[1] * page_size)
        seen = visible(token_row, row, position, places)
        kv = heads.at[rows.page_table[row]].get(mode="clip").reshape(places.size, -1, 2, head_dim)  # [S, K, 2, H]
        kv = jnp.where(seen[:, None, None, None], kv, 0)
        groups = query.astype(jnp.float32).reshape(kv.shape[1], -1, head_dim)  # [K, N / K, H]
        scores = jnp.einsum("kgh,skh->kgs", groups, kv[:, :, 0], precision="highest") * (scoring.scale * k_scale)
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
        scores = jnp.where(seen, scores, -jnp.inf)
        sink = sinks.reshape(kv.shape[1], -1, 1)
        top = jnp.maximum(scores.max(-1, keepdims=True), sink)
        top = jnp.where(jnp.isfinite(top), top, 0)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True) + jnp.exp(sink - top)
        out = jnp.einsum("kgs,skh->kgh", weights / jnp.where(total > 0, total, 1), kv[:, :, 1], precision="highest")
        return (out * v_scale).reshape(query.shape).astype(q.dtype)

    return jax.vmap(one)(jnp.arange(num_rows), q)
