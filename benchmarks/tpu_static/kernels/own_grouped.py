"""Baton's grouped matmul of experts. The "up" shapes are its fused gate and up products, SwiGLU included."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.tpu_static.bundles import Loop, Region, Schedule
from benchmarks.tpu_static.case import Case, Run, Runs, by_name
from benchmarks.tpu_static.kernels.shapes import GroupedShape, grouped_shape
from engine_core.aot.generation import Generation
from engine_core.kernels.grouped_matmul import grouped_matmul, tuned
from engine_core.kernels.grouped_matmul.tpu import Tiles


def build(generation: Generation, shape: str) -> Case:
    """Rows spread evenly over the experts."""
    sizes = grouped_shape(shape)
    products = 2 if "-up-" in shape else 1
    width = sizes.width // products
    key = tuned.TuningKey(rows=sizes.rows, depth=sizes.depth, width=width, products=products, weight_dtype="bfloat16")
    tiles = tuned.choose_tiles(key, _chip(generation))

    def multiply(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return grouped_matmul(x, weights, None, group_sizes, out_dtype=jnp.bfloat16, implementation="tpu")

    matrices = (sizes.num_experts, products, sizes.depth, width)
    return Case(
        function=multiply,
        arguments=(
            jax.ShapeDtypeStruct((sizes.rows, sizes.depth), jnp.bfloat16),
            jax.ShapeDtypeStruct(matrices, jnp.bfloat16),
            jax.ShapeDtypeStruct((sizes.num_experts,), jnp.int32),
        ),
        donate=(),
        flops=sizes.flops,
        hbm_bytes=sizes.hbm_bytes,
        dtype="bfloat16",
        pass_dma_bytes=0 if _tall_tiles(sizes, tiles) else 2 * products * sizes.depth * tiles.columns,
        runs=by_name({"grouped_matmul": _runs(sizes, tiles, width // tiles.columns)}),
    )


def _chip(generation: Generation) -> tuned.Chip:
    size = 128 if generation.name.startswith("v5") else 256
    return tuned.Chip(name=generation.name, vmem_bytes=generation.vmem_bytes, mxu_size=size)


def _runs(sizes: GroupedShape, tiles: Tiles, columns: int) -> Runs:
    """The grid around a loop over groups, which holds a loop over the tallest row tiles and the code of lower ones."""
    tall = _tall_tiles(sizes, tiles)
    has_low = sizes.rows // sizes.num_experts > tall * tiles.rows[-1]
    panels = -(-sizes.rows // tiles.panel)
    visits = sizes.num_experts + panels - 1  # a group that straddles panels takes part in both

    def runs(schedule: Schedule) -> Sequence[Run]:
        groups = max((loop for loop in schedule.loops if loop.depth == 1), key=lambda loop: loop.own.vmatmuls)
        low = max(_own_regions(schedule, groups), key=lambda region: region.cycles)
        taken = groups.own.cycles - (0 if has_low else low.cycles)
        found = []
        for loop in schedule.loops:
            if loop is groups:
                found.append(Run(visits * columns, taken))
            elif loop.parent is not None and schedule.loops[loop.parent] is groups:
                found.append(Run(visits * columns * tall, loop.own.cycles))
            else:
                found.append(Run(panels * columns if loop.depth == 0 else sizes.num_experts, loop.own.cycles))
        return found

    return runs


def _tall_tiles(sizes: GroupedShape, tiles: Tiles) -> int:
    """Of an expert's rows. They have a loop of their own, the hot one, within that which reads matrices."""
    *lower, tallest = tiles.rows
    return (sizes.rows // sizes.num_experts + tallest - 1 - (lower[-1] if lower else 0)) // tallest


def _own_regions(schedule: Schedule, loop: Loop) -> list[Region]:
    """Regions of a loop's body with no loop in them."""
    starts = [inner.start for inner in schedule.loops if inner is not loop]
    return [region for region in loop.regions if not any(region.start <= start < region.stop for start in starts)]
