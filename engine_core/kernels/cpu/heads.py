"""The entry to the compiled pass between a projection and attention: norms, rotation, rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

DIM_ALIGN = 32
"""What a head's size must be a multiple of: two vectors of the widest kind, one for each half."""


def split_heads(
    product: jax.Array,
    norms: tuple[jax.Array, jax.Array] | None,
    turns: tuple[jax.Array, jax.Array],
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    dtype: str,
    target: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values: those of the first two are normed, then rotated as `layers.rotary.rotate` says.

    Args:
        product: [T, (N + 2K) H] f32, queries, keys and values of each token one after the other.
        norms: scales of queries' and keys' norms, each [H] f32; None: they have none.
        turns: cosines and sines, each [T, 1, H / 2] f32.
        heads: N.
        kv_heads: K.
        eps: of the norms.
        dtype: "float32" or "bfloat16".
        target: the kernel's name in XLA.

    Returns:
        [T, N, H], [T, K, H] and [T, K, H], in `dtype`.
    """
    tokens, width = product.shape
    dim = width // (heads + 2 * kv_heads)
    shapes = [jax.ShapeDtypeStruct((tokens, count, dim), dtype) for count in (heads, kv_heads, kv_heads)]
    none = jnp.zeros(0, jnp.float32)
    q, k, v = jax.ffi.ffi_call(target, shapes)(product, *(norms or (none, none)), *turns, eps=np.float32(eps))
    return q, k, v
