"""Grouped matmul in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_MIN_TILE = 8
_MAX_TILE = 128


def tiled(
    x: jax.Array, weights: jax.Array, scales: jax.Array | None, group_sizes: jax.Array, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """One product per tile of rows of one group, in a loop; see `api.grouped_matmul`. For CPU.

    Only matrices of groups that have rows are read. A tile that reaches beyond its group's end writes rows of later
    groups, which their own tiles overwrite: so all tiles have one shape, and a row's bits do not depend on its
    neighbours.
    """
    num_rows, num_groups = x.shape[0], weights.shape[0]
    tile = min(max(_power_of_two(-(-num_rows // num_groups)), _MIN_TILE), _MAX_TILE)
    starts = jnp.cumsum(group_sizes) - group_sizes
    tile_ends = jnp.cumsum((group_sizes + tile - 1) // tile)
    padded = jnp.pad(x, ((0, tile), (0, 0)))

    def visit(index: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(tile_ends, index, side="right")
        first = tile_ends[group] - (group_sizes[group] + tile - 1) // tile
        row = starts[group] + (index - first) * tile
        rows = lax.dynamic_slice_in_dim(padded, row, tile)
        products = _product(rows, weights[group])
        if scales is not None:
            products = products * scales[group]
        return lax.dynamic_update_slice_in_dim(out, activate(products).astype(out_dtype), row, axis=0)

    nothing = jnp.zeros((num_rows + tile, weights.shape[2]), out_dtype)
    out: jax.Array = lax.fori_loop(0, tile_ends[-1], visit, nothing)
    return out[:num_rows]


def ragged_dot(
    x: jax.Array, weights: jax.Array, scales: jax.Array | None, group_sizes: jax.Array, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """`lax.ragged_dot_general`, which XLA lowers to kernels of its own on TPU; see `api.grouped_matmul`."""
    num_groups, num_products, size, _ = weights.shape
    if weights.dtype.itemsize == 1:
        weights = weights.astype(x.dtype)
    dims = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
    merged = weights.reshape(num_groups, num_products * size, -1)
    products = lax.ragged_dot_general(
        x.astype(weights.dtype), merged, group_sizes, dims, preferred_element_type=jnp.float32
    )
    products = products.reshape(-1, num_products, size)
    if scales is not None:
        group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
        products = products * scales.at[group].get(mode="clip")
    return activate(products).astype(out_dtype)


def activate(products: jax.Array) -> jax.Array:
    """[..., G, N] f32 -> [..., N]: the product itself, or `silu(first) * second`."""
    if products.shape[-2] == 1:
        return products[..., 0, :]
    return jax.nn.silu(products[..., 0, :]) * products[..., 1, :]


def _product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
    """[tile, K] x [G, N, K] -> [tile, G, N] f32."""
    if matrices.dtype.itemsize == 1:
        matrices = matrices.astype(rows.dtype)
    exact = lax.Precision.HIGHEST if matrices.dtype == jnp.float32 else lax.Precision.DEFAULT
    contract = (((1,), (2,)), ((), ()))
    rows = rows.astype(matrices.dtype)
    return lax.dot_general(rows, matrices, contract, precision=exact, preferred_element_type=jnp.float32)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
