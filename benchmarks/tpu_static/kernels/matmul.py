"""A plain tiled matmul. Its cycles can be told from its shape alone, so it shows whether the readings are right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu_static.case import Case, only_loop
from engine_core.aot.generation import Generation
from engine_core.errors import ConfigError

SHAPES = {"4096-bf16": jnp.bfloat16, "4096-int8": jnp.int8}
_SIZE = 4096
_TILE_M, _TILE_N, _TILE_K = 512, 1024, 1024


def build(generation: Generation, shape: str) -> Case:
    """[4096, 4096] x [4096, 4096] in tiles of 512 x 1024 x 1024."""
    if shape not in SHAPES:
        raise ConfigError(f"--shape of matmul must be one of {', '.join(SHAPES)}, not {shape!r}")
    dtype = jnp.dtype(SHAPES[shape])
    sums = jnp.int32 if dtype == jnp.int8 else jnp.float32
    grid = (_SIZE // _TILE_M, _SIZE // _TILE_N, _SIZE // _TILE_K)

    def kernel(
        a: jax.Ref,  # [TILE_M, TILE_K] VMEM
        b: jax.Ref,  # [TILE_K, TILE_N] VMEM
        out: jax.Ref,  # [TILE_M, TILE_N] VMEM
        total: jax.Ref,  # [TILE_M, TILE_N] VMEM, f32 or i32
    ) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(a[...], b[...], preferred_element_type=sums)

        @pl.when(pl.program_id(2) == grid[2] - 1)
        def _() -> None:
            out[...] = total[...].astype(out.dtype)

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        product: jax.Array = pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[
                pl.BlockSpec((_TILE_M, _TILE_K), lambda i, j, k: (i, k)),
                pl.BlockSpec((_TILE_K, _TILE_N), lambda i, j, k: (k, j)),
            ],
            out_specs=pl.BlockSpec((_TILE_M, _TILE_N), lambda i, j, k: (i, j)),
            out_shape=jax.ShapeDtypeStruct((_SIZE, _SIZE), dtype),
            scratch_shapes=[pltpu.VMEM((_TILE_M, _TILE_N), sums)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name="plain_matmul",
        )(a, b)
        return product

    matrix = jax.ShapeDtypeStruct((_SIZE, _SIZE), dtype)
    return Case(
        function=multiply,
        arguments=(matrix, matrix),
        donate=(),
        flops=2.0 * _SIZE**3,
        hbm_bytes=3.0 * _SIZE**2 * dtype.itemsize,
        dtype=dtype.name,
        pass_dma_bytes=dtype.itemsize * (_TILE_M * _TILE_K + _TILE_K * _TILE_N + _TILE_M * _TILE_N),
        runs=only_loop(grid[0] * grid[1] * grid[2]),
    )
