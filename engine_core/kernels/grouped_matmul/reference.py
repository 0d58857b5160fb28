"""The definition of the grouped matmul that every implementation is tested against. Slow on purpose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    scales: jax.Array | None,
    group_sizes: jax.Array,
    first: jax.Array | int,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Every row with every matrix in float32, of which its own group's is kept; see `api.grouped_matmul`."""
    wide = lax.dynamic_slice_in_dim(weights, first, group_sizes.size).astype(jnp.float32)
    if scales is not None:
        wide = wide * scales[:, :, None]
    products = jnp.einsum("mk,egkn->megn", x.astype(jnp.float32), wide, precision="highest")
    gates = products[:, :, 0]
    candidates = gates if weights.shape[1] == 1 else jax.nn.silu(gates) * products[:, :, 1]
    ends = jnp.cumsum(group_sizes)
    group = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")
    chosen = jnp.take_along_axis(candidates, jnp.minimum(group, ends.size - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where((group < ends.size)[:, None], chosen, 0).astype(out_dtype)
