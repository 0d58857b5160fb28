"""The entry to the grouped matmul: checks shapes, chooses an implementation.

Call it on local arrays, inside `jax.shard_map`: each device with its own experts and its own columns.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from engine_core.errors import ConfigError
from engine_core.kernels.grouped_matmul import reference, tpu, tuned, xla
from engine_core.kernels.shapes import check_shapes

Implementation = Literal["reference", "tiled", "ragged_dot", "tpu", "tpu_interpreted"]

_WEIGHT_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
_TPU_WEIGHT_DTYPES = _WEIGHT_DTYPES[1:]
_TPU_CHIPS = {"v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "7x": "tpu7x"}  # by jax's name
_MAX_PRODUCTS = 2
_SUBLANES = 16
_INTERPRETED_CHIP = tuned.Chip(name="interpreted", vmem_bytes=64 << 20, mxu_size=256)


def check_supported(dtype: str, weight_dtype: str, depth: int, width: int) -> None:
    """Refuse what the TPU kernel cannot do; call it at start.

    Args:
        dtype: of the rows.
        weight_dtype: of the matrices.
        depth: K on one device.
        width: N on one device.

    Raises:
        ConfigError: naming what is not supported, and what is.
    """
    if dtype != "bfloat16":
        raise ConfigError(f"grouped matmul on TPU: dtype {dtype} is not supported; supported: bfloat16")
    if weight_dtype not in _TPU_WEIGHT_DTYPES:
        listed = ", ".join(_TPU_WEIGHT_DTYPES)
        raise ConfigError(f"grouped matmul on TPU: weight dtype {weight_dtype} is not supported; supported: {listed}")
    for name, size in (("depth", depth), ("width", width)):
        if size % _SUBLANES:
            raise ConfigError(f"grouped matmul on TPU: {name} {size} of an expert is no multiple of {_SUBLANES}")


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    scales: jax.Array | None,
    group_sizes: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    implementation: Implementation,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Rows that are sorted by group, each multiplied with its group's matrix, accumulated in float32.

    With two matrices per group the result is `silu(x @ first) * (x @ second)`, SwiGLU's hidden activations; with one
    it is `x @ first`.

    Args:
        x: [M, K] f32 or bf16. The first group_sizes[0] rows belong to group 0, and so on.
        weights: [W, G, K, N], W at least E, G 1 or 2; f32, bf16, int8 or fp8. A TPU takes them in this orientation at
            twice the rate of the other (Hugging Face's).
        scales: [E, G, N] f32, factor of each output column; None: 1.
        group_sizes: [E] i32, sum at most M; any of them may be 0. The matrix of an empty group is not read.
        out_dtype: f32 or bf16.
        implementation: "tpu" is the Pallas kernel, "tiled" for CPU, "ragged_dot" XLA's own; "tpu_interpreted" and
            "reference" for tests.
        first: i32 scalar: group i has the matrices `weights[first + i]`. So a stack of many layers' matrices is taken
            as it lies: a slice of it would be a copy, three times the bytes.

    Returns:
        [M, N]. Rows beyond the last group's hold anything, NaN too.

    Raises:
        ValueError: shapes or dtypes do not fit.
        ConfigError: the TPU kernel cannot do this, see `check_supported`.
    """
    check_shapes("M K", x, "W G K N", weights, "E", group_sizes)
    if weights.shape[0] < group_sizes.shape[0]:
        raise ValueError(f"[W G K N]: W is {weights.shape[0]}, less than the {group_sizes.shape[0]} groups")
    if scales is not None:
        check_shapes("W G K N", weights, "E", group_sizes, "E G N", scales)
    if not 1 <= weights.shape[1] <= _MAX_PRODUCTS:
        raise ValueError(f"[W G K N]: G must be 1 or 2, not {weights.shape[1]}")
    if weights.dtype.name not in _WEIGHT_DTYPES:
        raise ValueError(f"weights must be one of {', '.join(_WEIGHT_DTYPES)}, not {weights.dtype.name}")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes must be int32, not {group_sizes.dtype.name}")
    if implementation in ("tpu", "tpu_interpreted"):
        interpreted = implementation == "tpu_interpreted"
        return _on_tpu(x, weights, scales, group_sizes, first, out_dtype, interpreted=interpreted)
    run = {"reference": reference.grouped_matmul, "tiled": xla.tiled, "ragged_dot": xla.ragged_dot}[implementation]
    return run(x, weights, scales, group_sizes, first, out_dtype)


def _on_tpu(
    x: jax.Array,
    weights: jax.Array,
    scales: jax.Array | None,
    group_sizes: jax.Array,
    first: jax.Array | int,
    out_dtype: jax.typing.DTypeLike,
    *,
    interpreted: bool,
) -> jax.Array:
    rows, depth = x.shape
    _, products, _, width = weights.shape
    check_supported(x.dtype.name, weights.dtype.name, depth, width)
    key = tuned.TuningKey(rows=rows, depth=depth, width=width, products=products, weight_dtype=weights.dtype.name)
    chip = _INTERPRETED_CHIP if interpreted else _chip()
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan") if interpreted else False
    tiles = tuned.choose_tiles(key, chip)
    return tpu.grouped_matmul(x, weights, scales, group_sizes, first, out_dtype, tiles=tiles, interpret=interpret)


def _chip() -> tuned.Chip:
    """The TPU that is traced for."""
    info = pltpu.get_tpu_info()
    version = str(info.chip_version)
    if version not in _TPU_CHIPS:
        listed = ", ".join(_TPU_CHIPS.values())
        raise ConfigError(f"grouped matmul on TPU: generation {version} is not supported; supported: {listed}")
    return tuned.Chip(name=_TPU_CHIPS[version], vmem_bytes=info.vmem_capacity_bytes, mxu_size=info.mxu_column_size)
