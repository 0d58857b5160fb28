"""Paged attention of decode on TPU: one query token for each sequence, its key and value put into the cache on the way.

One kernel instance walks a list of *items*: `tile_kv` tokens of one sequence after the other, sequence after sequence,
rows without tokens skipped, a group of items in each iteration. Pages come by DMA into a ring of `num_buffers` groups.
Iteration i of the loop
  - turns the scores of group i into weights,
  - multiplies the queries with the keys of group i + 1, for new scores, and starts the copies of group
    i + num_buffers - 1 meanwhile,
  - multiplies the weights with the values of group i, and stores the results of the sequences that end there,
  - waits for group i + 2, and puts the new tokens of the sequences that end there into it and into the cache.
The products and the softmax are independent of each other, so that the compiler overlaps them; a group is as large as
it is to pay for the latency at an iteration's end.

All KV heads of a token stay together: an item is a matrix of [tokens * K, H] rows in the order of the cache, each query
head is multiplied with all of them, and the scores of other heads' rows are masked. The MXU takes keys and values as
its stationary operand, whose loading is the bound in decode, so the additional query rows are free, while no strided
load or shuffle is spent on separating heads. Only K and V are: they share 32-bit words (`kv_words`).

Softmax is online in float32 (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) in base 2.

VMEM: num_buffers * group * tile_kv tokens of the cache + B query rows + 2 B cache rows
      + 1.5 * [group, N, tile_kv * K] f32. SMEM: the page table, B * P i32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine_core.kernels.paged_attention import kv_words
from engine_core.kernels.paged_attention import tpu_decode_attend as attend
from engine_core.kernels.paged_attention import tpu_decode_items as items
from engine_core.kernels.paged_attention.kv_words import WordLayout
from engine_core.kernels.paged_attention.tpu_decode_state import (
    INPUTS,
    LANES,
    MASKED,
    NEW_ROWS,
    RESULTS,
    SUBLANES,
    DecodeTiles,
    Refs,
    Sizes,
    choose_tiles,
)
from engine_core.kernels.shapes import check_shapes

__all__ = ["DecodeTiles", "choose_tiles", "decode"]

_LOG2_E = math.log2(math.e)


def _kernel(*all_refs: Any, sizes: Sizes) -> None:
    refs = Refs(*all_refs)
    inputs = [
        pltpu.make_async_copy(source, target, refs.sems.at[INPUTS])
        for source, target in ((refs.q_in, refs.q.at[pl.ds(0, sizes.rows)]), (refs.new_in, refs.new))
    ]
    for copy in inputs:
        copy.start()
    attend.fill_constants(refs, sizes)
    count = items.list_sequences(refs, sizes)
    lax.cond(count > 0, lambda: _walk(refs, sizes, count, inputs), lambda: _wait(inputs))
    results = refs.q.at[pl.ds(0, sizes.rows)]
    pltpu.make_async_copy(results, results, refs.sems.at[RESULTS]).wait()


def _wait(copies: list[Any]) -> None:
    for copy in copies:
        copy.wait()


def _walk(refs: Refs, sizes: Sizes, count: jax.Array, inputs: list[Any]) -> None:
    """All items, group by group."""
    ring = sizes.tiles.num_buffers

    def ahead(group: jax.Array, by: int) -> jax.Array:
        return lax.rem(group + by, ring)

    def arrive(slot: jax.Array) -> None:
        items.arrive(refs, slot)
        items.complete(refs, sizes, slot)

    cursor = items.begin(refs, sizes, jnp.int32(0), count)
    fetched = jnp.int32(0)
    for group in range(ring - 1):

        def fetch(cursor: items.Cursor = cursor, group: int = group) -> items.Cursor:
            return items.fetch_group(refs, sizes, jnp.int32(group), cursor)

        fetched += cursor.live.astype(jnp.int32)
        cursor = lax.cond(cursor.live, fetch, lambda cursor=cursor: cursor)
    _wait(inputs)
    arrive(jnp.int32(0))
    pl.when(fetched > 1)(lambda: arrive(jnp.int32(1)))
    for place in range(sizes.tiles.group):
        attend.score_item(refs, sizes, jnp.int32(0), place)

    def steady(carry: tuple[jax.Array, items.Cursor]) -> tuple[jax.Array, items.Cursor]:
        group, cursor = carry
        fetching = [(items.open_group(ahead(group, ring - 1)), cursor)]

        def fetch(place: int) -> None:
            fetching.append(items.extend(refs, sizes, fetching[-1][0], place, fetching[-1][1]))

        attend.attend(refs, sizes, ahead(group, 0), ahead(group, 1), fetch)
        items.close_group(refs, fetching[-1][0])
        items.send_results(refs, sizes, ahead(group, 0))
        arrive(ahead(group, 2))
        return group + 1, fetching[-1][1]

    steadily, cursor = lax.while_loop(lambda carry: carry[1].live, steady, (jnp.int32(0), cursor))
    fetched += steadily

    def drain(group: jax.Array, _: None) -> None:
        attend.attend(refs, sizes, ahead(group, 0), ahead(group, 1), lambda place: None)
        items.send_results(refs, sizes, ahead(group, 0))
        pl.when(group + 2 < fetched)(lambda: arrive(ahead(group, 2)))

    lax.fori_loop(steadily, fetched - 1, drain, None)
    attend.attend_last(refs, sizes, ahead(fetched, -1 + ring))
    items.send_results(refs, sizes, ahead(fetched, -1 + ring))
    written = refs.leaving.at[pl.ds(0, count)]
    pltpu.make_async_copy(written, written, refs.sems.at[NEW_ROWS]).wait()


def _pad_to(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if array.shape == shape:
        return array
    return jnp.pad(array, [(0, after - before) for before, after in zip(array.shape, shape, strict=True)])


def decode(  # noqa: PLR0913 (a kernel's operands)
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    base_page: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    num_decode: jax.Array,
    sinks: jax.Array | None,
    k_scale: jax.Array | float | None,
    v_scale: jax.Array | float | None,
    *,
    scale: float,
    window: int | jax.Array,
    soft_cap: float | None,
    tiles: DecodeTiles,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Append one token to each sequence and attend to all of it.

    Args:
        q: [B, N, H], one query token for each row.
        k: [B, K, H] of the same tokens, after rotary embedding.
        v: [B, K, H].
        cache: [pages of all layers, page_size, 2K / pack, pack, align(H, 128)] bf16, f32, int8 or fp8. Donated: written
            in place. Places that no query sees may hold anything, NaN too.
        base_page: [1] i32, the layer's first page.
        kv_lens: [B] i32, tokens with the new one; 0 is padding.
        page_table: [B, P] i32, page ids within a layer, in order; anything beyond the last used page.
        num_decode: [1] i32; rows from it on are padding.
        sinks: [N] f32, a score of each head that takes weight and has no value; None: none.
        k_scale: value of one unit of the cached keys; None: 1.
        v_scale: the same for values.
        scale: of the scores, H ** -0.5 as a rule.
        window: tokens that a query sees, its own included; 0: all. An int or [1] i32.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None: they stay.
        tiles: from `tuned`.
        interpret: False, or `pltpu.InterpretParams`.

    Returns:
        [B, N, H] in q's dtype, zeros in padding rows; the cache.

    Raises:
        ValueError: shapes or tiles do not fit.
    """
    check_shapes("B N H", q, "B K H", k, "B K H", v, "B", kv_lens, "B P", page_table, "1", base_page, "1", num_decode)
    num_rows, num_heads, head_dim = q.shape
    page_size, words, pack, width = cache.shape[1:]
    layout = WordLayout(kv_heads=k.shape[1], words=words, pack=pack, width=width)
    _check(q, k, cache, layout, tiles)
    scales = jnp.ones(2, jnp.float32)
    if k_scale is not None or v_scale is not None:
        scales = jnp.stack([jnp.asarray(1 if s is None else s, jnp.float32).reshape(()) for s in (k_scale, v_scale)])
        k, v = k.astype(jnp.float32) / scales[0], v.astype(jnp.float32) / scales[1]
    heads = -(-num_heads // SUBLANES) * SUBLANES
    sizes = Sizes(
        rows=num_rows,
        heads=heads,
        group_heads=num_heads // k.shape[1],
        pages=page_table.shape[1],
        page_size=page_size,
        words=layout,
        tiles=tiles,
        scale=scale,
        soft_cap=soft_cap,
        windowed=not (isinstance(window, int) and window == 0),
        native=interpret is False,
    )
    sink_rows = jnp.full((num_heads,), MASKED, jnp.float32) if sinks is None else sinks.astype(jnp.float32) * _LOG2_E
    sink_rows = jnp.broadcast_to(_pad_to(sink_rows, (heads,))[:, None], (heads, LANES))
    padded = (num_rows, heads, width)
    vmem, smem, hbm = (pl.BlockSpec(memory_space=space) for space in (pltpu.VMEM, pltpu.SMEM, pl.ANY))
    out, cache = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        out_shape=(jax.ShapeDtypeStruct(padded, q.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype)),
        in_specs=[smem] * 6 + [vmem] + [hbm] * 3,
        out_specs=(hbm, hbm),
        scratch_shapes=_scratch(sizes, q.dtype, cache.dtype),
        input_output_aliases={9: 1},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=_vmem_bytes(sizes, q.dtype)),
        interpret=interpret,
        name="paged_attention_decode",
    )(
        kv_lens.astype(jnp.int32),
        page_table.astype(jnp.int32).reshape(-1),
        base_page.astype(jnp.int32),
        num_decode.astype(jnp.int32),
        jnp.asarray(window, jnp.int32).reshape(1),
        scales,
        sink_rows,
        _pad_to(q, padded),
        kv_words.pack_words(k, v, layout, cache.dtype),
        cache,
    )
    return out[:, :num_heads, :head_dim], cache


def _scratch(sizes: Sizes, dtype: Any, storage: Any) -> list[Any]:
    """The kernel's own memory, in the order of `Refs`."""
    layout, tiles = sizes.words, sizes.tiles
    token = (layout.words, layout.pack, layout.width)
    item = (tiles.group, sizes.heads, tiles.tile_kv * layout.heads)
    by_lane = (sizes.heads, LANES)
    items_noted = pltpu.SMEM((tiles.num_buffers * tiles.group,), jnp.int32)
    groups_noted = pltpu.SMEM((tiles.num_buffers,), jnp.int32)
    return [
        pltpu.VMEM((sizes.rows + 1, sizes.heads, layout.width), dtype),
        pltpu.VMEM((sizes.rows, layout.words, layout.width), jnp.uint32),
        pltpu.VMEM((sizes.rows, *token), storage),
        pltpu.VMEM((tiles.num_buffers, tiles.group * tiles.tile_kv, *token), storage),
        pltpu.VMEM(item, jnp.float32),
        pltpu.VMEM(item, dtype),
        pltpu.VMEM((tiles.group, *by_lane), jnp.float32),
        pltpu.VMEM((tiles.group, *by_lane), jnp.float32),
        pltpu.VMEM((SUBLANES, layout.block_rows), jnp.int32),
        pltpu.VMEM((sizes.heads, layout.block_rows), jnp.float32),
        pltpu.VMEM(by_lane, jnp.float32),
        pltpu.VMEM(by_lane, jnp.float32),
        pltpu.VMEM((sizes.heads, layout.width), jnp.float32),
        pltpu.VMEM((sizes.heads, layout.width), dtype),
        pltpu.SMEM((sizes.rows + 1,), jnp.int32),
        *[items_noted] * 6,
        groups_noted,
        groups_noted,
        items_noted,
        pltpu.SemaphoreType.DMA((tiles.num_buffers,)),
        pltpu.SemaphoreType.DMA((3,)),
    ]


def _vmem_bytes(sizes: Sizes, dtype: Any) -> int:
    """What the kernel needs, with room for the compiler's own."""
    layout, tiles = sizes.words, sizes.tiles
    token = 4 * layout.words * layout.width
    rows = sizes.rows * (2 * token + sizes.heads * layout.width * int(jnp.dtype(dtype).itemsize))
    ring = tiles.num_buffers * tiles.group * tiles.tile_kv * token
    scores = 8 * sizes.heads * tiles.group * tiles.tile_kv * layout.heads
    return rows + ring + scores + (8 << 20)


def _check(q: jax.Array, k: jax.Array, cache: jax.Array, layout: WordLayout, tiles: DecodeTiles) -> None:
    """Refuse what does not fit together, naming the field."""
    bits = jnp.dtype(cache.dtype).itemsize * 8
    if layout.pack != 32 // bits:
        raise ValueError(f"cache: pack is {layout.pack}, but {cache.dtype} needs {32 // bits}")
    if layout.width % LANES or q.shape[2] > layout.width:
        raise ValueError(f"cache: rows of {layout.width} do not hold head_dim {q.shape[2]} in multiples of {LANES}")
    if not 2 * k.shape[1] <= layout.words * layout.pack < 2 * k.shape[1] + layout.pack:
        raise ValueError(f"cache: {layout.words} words of {layout.pack} are not those of {k.shape[1]} KV heads")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q: {q.shape[1]} heads do not divide by {k.shape[1]} KV heads")
    for name, size in (("page_size", cache.shape[1]), ("block_tokens", layout.block_tokens)):
        if tiles.tile_kv % size:
            raise ValueError(f"tiles: tile_kv {tiles.tile_kv} is not a multiple of {name} {size}")
    if tiles.num_buffers < 3:
        raise ValueError(f"tiles: num_buffers must be at least 3, not {tiles.num_buffers}")
