"""Baton's paged attention: the decode and the prefill kernel, this step's keys and values written on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from benchmarks.tpu_static.bundles import Loop, Schedule, ScheduleError
from benchmarks.tpu_static.case import Case, Run, Runs, by_name
from benchmarks.tpu_static.kernels.shapes import AttentionShape, attention_shape
from engine_core.aot.generation import Generation
from engine_core.kernels.paged_attention import Rows, Scoring, TuningKey, paged_attention, tuned
from engine_core.kernels.paged_attention.tpu_decode import DecodeTiles
from engine_core.kernels.paged_attention.tpu_prefill import PrefillTiles
from engine_core.kv_cache import CacheLayout

_REGISTER_BYTES = 4096
_UNROLLED = 4  # query heads, or lane groups, of one pass of the loops around an item's tiles


def build(generation: Generation, shape: str) -> Case:
    """One layer of a cache that holds the shape's sequences, and this step's rows."""
    del generation
    sizes = attention_shape(shape)
    layout = CacheLayout(
        num_layers=1,
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        dtype="bfloat16",
        head_align=128,
    )

    joined = layout.heads_per_row
    as_kernels_see = replace(sizes, num_kv_heads=sizes.num_kv_heads // joined, head_dim=sizes.head_dim * joined)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, cache: jax.Array, table: jax.Array, lens: jax.Array, cu: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        places = jnp.zeros(sizes.num_tokens, jnp.int32)  # not read: the TPU kernels find them in the page table
        rows = Rows(places, places, table, lens, cu, None)
        return paged_attention(q, k, v, cache, 0, rows, Scoring(scale=sizes.head_dim**-0.5, window=0), "tpu")

    new = jax.ShapeDtypeStruct((sizes.num_tokens, sizes.num_kv_heads, sizes.head_dim), jnp.bfloat16)
    return Case(
        function=attend,
        arguments=(
            jax.ShapeDtypeStruct((sizes.num_tokens, sizes.num_heads, sizes.head_dim), jnp.bfloat16),
            new,
            new,
            jax.ShapeDtypeStruct((1, sizes.num_pages, *layout.page_shape), jnp.bfloat16),
            jax.ShapeDtypeStruct((sizes.num_seqs, sizes.pages_per_seq), jnp.int32),
            jax.ShapeDtypeStruct((sizes.num_seqs,), jnp.int32),
            jax.ShapeDtypeStruct((sizes.num_seqs + 1,), jnp.int32),
        ),
        donate=(3,),
        flops=sizes.flops,
        hbm_bytes=sizes.hbm_bytes,
        dtype="bfloat16",
        pass_dma_bytes=None,
        pass_copies=_pass_copies(as_kernels_see),
        copy_bytes=2 * math.prod(layout.page_shape),
        runs=_runs(as_kernels_see),
    )


def _pass_copies(sizes: AttentionShape) -> int:
    """Decode: the pages of a group of items, of the tokens that they hold. Prefill copies outside of its hot body."""
    if sizes.q_len > 1:
        return 0
    tiles = tuned.decode_tiles(*_tuned_for(sizes))
    return tiles.group * tiles.tile_kv // sizes.page_size


def _runs(sizes: AttentionShape) -> Runs:
    if sizes.q_len == 1:
        return by_name({"paged_attention": _decode_runs(sizes, tuned.decode_tiles(*_tuned_for(sizes)))})
    return by_name({"paged_attention": _prefill_runs(sizes, tuned.prefill_tiles(*_tuned_for(sizes)))})


def _tuned_for(sizes: AttentionShape) -> tuple[TuningKey, str]:
    """What tiles are chosen by."""
    key = TuningKey(
        op="decode" if sizes.q_len == 1 else "prefill",
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        dtype="bfloat16",
        cache_dtype="bfloat16",
        page_size=sizes.page_size,
    )
    device = jax.sharding.get_abstract_mesh().abstract_device  # that is traced for
    assert device is not None
    return key, str(device.device_kind)


def _decode_runs(sizes: AttentionShape, tiles: DecodeTiles) -> Runs:
    """The steady loop over groups of items and the one that drains the ring, each with loops over a group's edges.

    A sequence ends with a whole item here, so nothing is cleared; all rows have tokens, so none is blanked.
    """
    if sizes.kv_len % tiles.tile_kv:
        raise ScheduleError(f"kv_len {sizes.kv_len} is no multiple of tile_kv {tiles.tile_kv}")
    groups = sizes.num_seqs * sizes.kv_len // tiles.tile_kv / tiles.group
    edges = sizes.num_seqs / groups
    query_bytes = 2 * sizes.num_tokens * sizes.num_heads * sizes.head_dim

    def runs(schedule: Schedule) -> Sequence[Run]:
        walks = [loop for loop in schedule.loops if loop.depth == 0 and loop.own.vmatmuls]
        if len(walks) != 2:
            raise ScheduleError(f"{schedule.name} has {len(walks)} loops over groups, not two")
        walked = dict(zip(map(id, walks), (groups - tiles.num_buffers + 1, tiles.num_buffers - 2), strict=True))
        parents = {loop.parent for loop in schedule.loops}

        def passes(index: int, loop: Loop) -> float:
            if id(loop) in walked:
                return walked[id(loop)]
            if loop.depth > 0:
                assert loop.parent is not None
                return walked.get(id(schedule.loops[loop.parent]), 0) * edges
            if index in parents or loop.start > walks[0].start:  # edges of the first groups, results of the last
                return edges
            if _copies_registers(loop):
                return query_bytes / _copied_bytes(loop)
            return 0 if loop.own.dmas else sizes.num_seqs

        return [Run(passes(index, loop), loop.own.cycles) for index, loop in enumerate(schedule.loops)]

    return runs


def _prefill_runs(sizes: AttentionShape, tiles: PrefillTiles) -> Runs:
    """The loop over items, with one over tiles of keys and values in it, which holds two over KV heads: without masks
    and with. All of it is there twice, for large and for small items, which do not occur at these shapes.
    """
    context = sizes.kv_len - sizes.q_len
    if sizes.q_len % tiles.tile_q or context % tiles.tile_kv or tiles.tile_q % tiles.tile_kv:
        raise ScheduleError(f"queries of {sizes.q_len} at {context} do not fall on whole tiles")
    items = sizes.num_seqs * sizes.q_len // tiles.tile_q
    diagonal = tiles.tile_q // tiles.tile_kv  # tiles of an item that need masks
    masked = items * diagonal
    starts = range(context, sizes.kv_len, tiles.tile_q)
    whole = sizes.num_seqs * sum(start // tiles.tile_kv for start in starts)
    steps = sizes.num_kv_heads // tiles.body_heads
    pages = (whole + masked) * tiles.tile_kv / sizes.page_size + sizes.num_tokens / sizes.page_size
    query_bytes = 2 * tiles.tile_q * sizes.num_heads * sizes.head_dim
    lane_groups = sizes.num_heads * tiles.tile_q // tiles.lanes

    def runs(schedule: Schedule) -> Sequence[Run]:
        loops = schedule.loops
        bodies = sorted((loop for loop in loops if loop.own.vmatmuls), key=lambda loop: loop.own.vmatmuls)[-2:]
        bodies.sort(key=lambda loop: loop.own.use["VALU"])
        parent = bodies[0].parent
        if parent is None or parent != bodies[1].parent or loops[parent].parent is None:
            raise ScheduleError(f"{schedule.name}: its two bodies are in no loop over tiles in one over items")
        tile_loop, item_loop = loops[parent], loops[parent].parent
        siblings = [loop for loop in loops if loop.parent == item_loop]
        at = siblings.index(tile_loop)
        around = siblings[at - 2 : at + 3]  # scale queries, begin, tiles, finish, store results
        by_loop: dict[int, float] = {id(loops[item_loop or 0]): items, id(tile_loop): whole + masked}
        by_loop |= zip(map(id, bodies), (whole * steps, masked * steps), strict=True)
        for loop, count in zip(around, (sizes.num_heads, lane_groups, 0, lane_groups, sizes.num_heads), strict=True):
            by_loop.setdefault(id(loop), items * count / _UNROLLED)
        copying = [loop for loop in loops if loop.parent == parent and loop.own.dmas]
        by_loop |= {id(loop): pages / len(copying) for loop in copying}
        by_loop |= {
            id(loop): items * query_bytes / _copied_bytes(loop) / 2
            for loop in siblings[: at - 2]
            if _copies_registers(loop)
        }
        bias = bodies[1].start - bodies[0].stop if bodies[0].stop < bodies[1].start else 0
        found = [Run(by_loop.get(id(loop), 0), loop.own.cycles) for loop in loops]
        found[parent] = Run(whole + masked, round(tile_loop.own.cycles - bias * whole / (whole + masked)))
        return found

    return runs


def _copies_registers(loop: Loop) -> bool:
    """A copy from VMEM to VMEM: XLA may have put the queries there, and then their DMA is a loop."""
    work = loop.own
    return not work.dmas and not work.use["VALU"] and work.use["VLOAD"] > work.cycles


def _copied_bytes(loop: Loop) -> int:
    return loop.own.use["VSTORE"] * _REGISTER_BYTES
