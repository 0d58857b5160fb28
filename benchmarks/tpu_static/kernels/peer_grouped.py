"""Other people's grouped matmul: JAX's megablox, `lax.ragged_dot`, and tokamax's gmm_v2."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu_static.bundles import Region, Schedule
from benchmarks.tpu_static.case import Case, Run, Runs, by_name, hot_chain, only_loop
from benchmarks.tpu_static.kernels.shapes import GroupedShape, grouped_shape
from engine_core.aot.generation import Generation
from engine_core.errors import ConfigError

_FEW_ROWS = 1024
_MEGABLOX_ROWS = {True: 128, False: 256}  # tile of rows, where there are few and else
_MEGABLOX_WIDTH = {1536: 768, 2048: 1024}
_RAGGED_DOT_ROWS = 256


def megablox(generation: Generation, shape: str) -> Case:
    """`jax.experimental.pallas.ops.tpu.megablox.gmm`, in tiles that a sweep found good."""
    del generation
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox")
    sizes = grouped_shape(shape)
    rows, width = _MEGABLOX_ROWS[sizes.rows <= _FEW_ROWS], _MEGABLOX_WIDTH[sizes.width]

    def multiply(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
        tiling = (rows, sizes.depth, width)
        out: jax.Array = module.gmm(lhs, rhs, group_sizes, preferred_element_type=jnp.bfloat16, tiling=tiling)
        return out

    return _case(sizes, multiply, by_name({"gmm": only_loop(_visits(sizes, rows) * sizes.width / width)}))


def ragged_dot(generation: Generation, shape: str) -> Case:
    """`jax.lax.ragged_dot`, which XLA itself turns into two kernels.

    On v6e and tpu7x a pass is a tile of 256 rows by all columns; on v5e and v5p XLA takes narrower ones, whose number
    its listings do not tell.
    """
    if generation.name.startswith("v5"):
        raise ConfigError(f"jax-ragged-dot: how often its loop runs on {generation.name} is not known")
    sizes = grouped_shape(shape)

    def multiply(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.bfloat16)

    visits = _visits(sizes, _RAGGED_DOT_ROWS)
    return _case(
        sizes,
        multiply,
        by_name({"ragged-dot-none": only_loop(visits), "ragged-dot-metadata": _every(float(sizes.num_experts))}),
    )


def tokamax_gmm(generation: Generation, shape: str) -> Case:
    """Tokamax's gmm_v2. A visit takes one branch of a ladder by its number of rows: the smallest that fits."""
    del generation
    try:
        module = importlib.import_module("tokamax._src.ops.gmm_v2.gmm_v2")
    except ImportError as error:
        raise ConfigError(f"tokamax is not installed (it needs Python 3.12): {error}") from None
    sizes = grouped_shape(shape)

    def multiply(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
        out: jax.Array = module.gmm_v2(lhs, rhs, group_sizes)
        return out

    return _case(sizes, multiply, by_name({"gmm_v2": _shortest_branch(sizes.num_experts)}))


def _every(passes: float) -> Runs:
    def runs(schedule: Schedule) -> Sequence[Run]:
        return [Run(passes, loop.own.cycles) for loop in schedule.loops]

    return runs


def _shortest_branch(visits: int) -> Runs:
    """A body whose big regions exclude each other: of those, only the shortest runs."""

    def runs(schedule: Schedule) -> Sequence[Run]:
        hot = schedule.hot_loop()
        counted = hot_chain([visits], 1.0)(schedule)
        assert hot is not None
        leaves = _leaves([region for region in hot.regions if region.cycles > hot.own.cycles // 50])
        cycles = hot.own.cycles - sum(leaf.cycles for leaf in leaves) + min(leaf.cycles for leaf in leaves)
        return [Run(visits, cycles) if loop is hot else run for loop, run in zip(schedule.loops, counted, strict=True)]

    return runs


def _leaves(regions: Sequence[Region]) -> list[Region]:
    """Regions with no other inside."""
    return [
        region
        for region in regions
        if not any(
            other is not region and region.start <= other.start and other.stop <= region.stop for other in regions
        )
    ]


def _visits(sizes: GroupedShape, rows: int) -> int:
    """Pairs of a tile of rows and an expert with rows in it, where no expert's rows end at a tile's end."""
    return sizes.rows // rows + sizes.num_experts - 1


def _case(sizes: GroupedShape, function: Callable[..., Any], runs: Runs) -> Case:
    return Case(
        function=function,
        arguments=(
            jax.ShapeDtypeStruct((sizes.rows, sizes.depth), jnp.bfloat16),
            jax.ShapeDtypeStruct((sizes.num_experts, sizes.depth, sizes.width), jnp.bfloat16),
            jax.ShapeDtypeStruct((sizes.num_experts,), jnp.int32),
        ),
        donate=(),
        flops=sizes.flops,
        hbm_bytes=sizes.hbm_bytes,
        dtype="bfloat16",
        pass_dma_bytes=None,
        runs=runs,
    )
