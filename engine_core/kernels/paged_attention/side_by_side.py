"""Attention over a cache with several narrow heads in each row, by way of one whose heads are as wide as its rows.

F KV heads of H elements side by side are one head of F * H elements for every product: a query that is zero but for the
part of its own head gets its own scores, and of the summed values its own part is its result. So the kernels see K / F
heads of F * H, as many bytes as there are, and no vector register that is half empty. (`engine_core.kv_cache` says when
the cache is laid out so.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def join(q: jax.Array, k: jax.Array, v: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lay heads side by side.

    Args:
        q: [T, N, H].
        k: [T, K, H].
        v: [T, K, H].
        count: F, KV heads in a row; divides K.

    Returns:
        [T, N, F * H], each query in the part that its KV head has; [T, K / F, F * H]; the same.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    rows = (num_tokens, num_kv_heads // count, count * head_dim)
    group = num_heads // num_kv_heads
    grouped = q.reshape(num_tokens, num_kv_heads // count, count, group, 1, head_dim)
    own = jnp.eye(count, dtype=bool)[:, None, :, None]  # [part of the KV head, 1, part of the row, 1]
    queries = jnp.where(own, grouped, 0).reshape(num_tokens, num_heads, count * head_dim)
    return queries, k.reshape(rows), v.reshape(rows)


def take(out: jax.Array, num_kv_heads: int, count: int) -> jax.Array:
    """Take each query's own part, [T, N, H], of results [T, N, F * H]."""
    num_tokens, num_heads, width = out.shape
    parts = out.reshape(num_tokens, num_kv_heads // count, count, num_heads // num_kv_heads, count, width // count)
    own = [parts[:, :, part, :, part] for part in range(count)]
    return jnp.stack(own, axis=2).reshape(num_tokens, num_heads, width // count)
