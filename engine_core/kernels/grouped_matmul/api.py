"""The entry to the grouped matmul: checks shapes, chooses an implementation.

Call it on local arrays, inside `jax.shard_map`: each device with its own experts and its own columns.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from engine_core.kernels.grouped_matmul import reference, xla
from engine_core.kernels.shapes import check_shapes

Implementation = Literal["reference", "tiled", "ragged_dot"]

_WEIGHT_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
_MAX_PRODUCTS = 2


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    scales: jax.Array | None,
    group_sizes: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    implementation: Implementation,
) -> jax.Array:
    """Rows that are sorted by group, each multiplied with its group's matrix, accumulated in float32.

    With two matrices per group the result is `silu(x @ first) * (x @ second)`, SwiGLU's hidden activations; with one
    it is `x @ first`.

    Args:
        x: [M, K] f32 or bf16. The first group_sizes[0] rows belong to group 0, and so on.
        weights: [E, G, K, N], G 1 or 2; f32, bf16, int8 or fp8. A TPU takes them in this orientation at twice the rate
            of the other (Hugging Face's).
        scales: [E, G, N] f32, factor of each output column; None: 1.
        group_sizes: [E] i32, sum at most M; any of them may be 0. The matrix of an empty group is not read.
        out_dtype: f32 or bf16.
        implementation: "tiled" for CPU, "ragged_dot" for XLA's own, "reference" for tests.

    Returns:
        [M, N]. Rows beyond the last group's hold anything, NaN too.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_shapes("M K", x, "E G K N", weights, "E", group_sizes)
    if scales is not None:
        check_shapes("E G K N", weights, "E G N", scales)
    if not 1 <= weights.shape[1] <= _MAX_PRODUCTS:
        raise ValueError(f"[E G K N]: G must be 1 or 2, not {weights.shape[1]}")
    if weights.dtype.name not in _WEIGHT_DTYPES:
        raise ValueError(f"weights must be one of {', '.join(_WEIGHT_DTYPES)}, not {weights.dtype.name}")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes must be int32, not {group_sizes.dtype.name}")
    run = {"reference": reference.grouped_matmul, "tiled": xla.tiled, "ragged_dot": xla.ragged_dot}[implementation]
    return run(x, weights, scales, group_sizes, out_dtype)
