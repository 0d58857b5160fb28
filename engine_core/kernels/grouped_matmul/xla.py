"""Grouped matmul in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_MIN_TILE = 8
_MAX_TILE = 128
_BFLOAT16_SHIFT = 16  # of its bits within those of a float32


def tiled(
    x: jax.Array,
    weights: jax.Array,
    scales: jax.Array | None,
    group_sizes: jax.Array,
    first: jax.Array | int,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """One product per tile of rows of one group, in a loop; see `api.grouped_matmul`. For CPU.

    Only matrices of groups that have rows are read. A tile that reaches beyond its group's end writes rows of later
    groups, which their own tiles overwrite: so all tiles have one shape, and a row's bits do not depend on its
    neighbours.
    """
    num_rows, num_groups = x.shape[0], group_sizes.size
    tile = min(max(_power_of_two(-(-num_rows // num_groups)), _MIN_TILE), _MAX_TILE)
    starts = jnp.cumsum(group_sizes) - group_sizes
    tile_ends = jnp.cumsum((group_sizes + tile - 1) // tile)
    rounded = x.astype(weights.dtype) if weights.dtype.itemsize > 1 else x
    padded = jnp.pad(rounded, ((0, tile), (0, 0)))

    def visit(index: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(tile_ends, index, side="right")
        first_tile = tile_ends[group] - (group_sizes[group] + tile - 1) // tile
        row = starts[group] + (index - first_tile) * tile
        rows = lax.dynamic_slice_in_dim(padded, row, tile)
        matrices = [_matrix(weights, first + group, i) for i in range(weights.shape[1])]
        products = jnp.stack([_product(rows, matrix) for matrix in matrices], axis=1)
        if scales is not None:
            products = products * scales[group]
        return lax.dynamic_update_slice_in_dim(out, activate(products).astype(out_dtype), row, axis=0)

    nothing = jnp.zeros((num_rows + tile, weights.shape[3]), out_dtype)
    out: jax.Array = lax.fori_loop(0, tile_ends[-1], visit, nothing)
    return out[:num_rows]


def ragged_dot(
    x: jax.Array,
    weights: jax.Array,
    scales: jax.Array | None,
    group_sizes: jax.Array,
    first: jax.Array | int,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`lax.ragged_dot_general`, which XLA lowers to kernels of its own on TPU; see `api.grouped_matmul`."""
    weights = lax.dynamic_slice_in_dim(weights, first, group_sizes.size)  # no copy where these are all
    num_groups, num_products, depth, width = weights.shape
    if weights.dtype.itemsize == 1:
        weights = weights.astype(x.dtype)
    flat = weights.reshape(num_groups * num_products, depth, width)
    products = []
    for index in range(num_products):  # each sees the others' matrices as empty groups, so that nothing is copied
        sizes = jnp.zeros((num_groups, num_products), jnp.int32).at[:, index].set(group_sizes).reshape(-1)
        rows = x.astype(weights.dtype)
        exact = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else lax.Precision.DEFAULT
        products.append(lax.ragged_dot(rows, flat, sizes, precision=exact, preferred_element_type=jnp.float32))
    stacked = jnp.stack(products, axis=1)
    if scales is not None:
        group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
        stacked = stacked * scales.at[group].get(mode="clip")
    return activate(stacked).astype(out_dtype)


def activate(products: jax.Array) -> jax.Array:
    """[..., G, N] f32 -> [..., N]: the product itself, or `silu(first) * second`."""
    if products.shape[-2] == 1:
        return products[..., 0, :]
    return jax.nn.silu(products[..., 0, :]) * products[..., 1, :]


def _product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """[tile, K] x [K, N] -> [tile, N] f32."""
    exact = lax.Precision.HIGHEST if matrix.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.dot(rows.astype(matrix.dtype), matrix, precision=exact, preferred_element_type=jnp.float32)


def _matrix(weights: jax.Array, group: jax.Array, index: int) -> jax.Array:
    """One of a group's matrices, [K, N] f32.

    XLA:CPU would widen all of them, outside the loop, if it saw a conversion; so bfloat16 is widened by its bits.
    """
    if weights.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(weights, jnp.uint16)[group, index]
        return lax.bitcast_convert_type(bits.astype(jnp.uint32) << _BFLOAT16_SHIFT, jnp.float32)
    return weights[group, index].astype(jnp.float32)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
