"""Paged attention of any number of query tokens per sequence on TPU, their keys and values written on the way.

One kernel instance walks a list of *items*, query tiles of one sequence after the other, sequence after sequence; and
for each item the tiles of keys and values that its tokens see. A tile of queries is large, or small where that holds
all that is left of the sequence: chunks of prompts and few tokens (speculation, a single one) get the size they need.

Order of the copies, all by DMA, the next one under way while a tile is computed:
  - the pages of the next tile of keys and values, which may be the first one of the next item or sequence;
  - the queries of the next item; the results of the one before;
  - this step's new keys and values, from HBM to HBM: the part that belongs to one tile is written while the tile before
    it is computed, and is awaited before the tile's pages are first read. Nothing else reads those tokens.
A tile that every query of the item sees whole runs without masks; for the others a bias is made once for all heads.

VMEM: 2 * tile_kv tokens of the cache, 4 * tile_q query rows (in, out), N * tile_q query rows in the compute dtype, f32
results of the same size, scores (lookahead + 1) * tile_kv * lanes. SMEM: the page table, B * P i32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine_core.kernels.paged_attention import head_rows, kv_words, prefill_tile
from engine_core.kernels.paged_attention.prefill_tile import MASKED, TileRefs, TileShape, TileSizes
from engine_core.kernels.paged_attention.rows import Rows, Scoring

_LANES = 128
_LOG2_E = math.log2(math.e)
_FAR = 2**30
_UNROLL = 2  # word rows
_ROWS = 16  # of a tile of bfloat16
_SPILL_BYTES = 12 << 20  # room for the compiler's own


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillTiles:
    """Static sizes of the prefill kernel.

    Attributes:
        tile_q: query tokens of a large tile; a multiple of `lanes`.
        lanes: queries of one product in a large tile, 128 or 256.
        tile_kv: tokens of keys and values; a multiple of the page size, of `sub_kv` and of 128.
        sub_kv: scores of so many tokens make one product.
        lookahead: products of scores begun before the first of them is turned into weights.
        body_heads: KV heads in one loop body; divides K.
    """

    tile_q: int
    lanes: int
    tile_kv: int
    sub_kv: int
    lookahead: int
    body_heads: int


class _Sizes(NamedTuple):
    """Static sizes of one call."""

    rows: int  # B
    pages: int  # P
    page_size: int
    large: TileShape
    small: TileShape
    tile: TileSizes
    scale: float  # of queries, base and soft cap included
    windowed: bool

    @property
    def tile_pages(self) -> int:
        return self.tile.tile_kv // self.page_size


class _Refs(NamedTuple):
    """What the kernel sees."""

    cu_q_lens: Any  # [B + 1] i32 SMEM
    kv_lens: Any  # [B] i32 SMEM
    page_table: Any  # [B * P] i32 SMEM
    base_page: Any  # [1] i32 SMEM
    row_range: Any  # [2] i32 SMEM: first row, end
    window: Any  # [1] i32 SMEM
    kv_scales: Any  # [2] f32 SMEM
    sinks: Any  # [N] f32 SMEM, base 2; None: none
    q_hbm: Any  # [T, N / pack, pack, H]
    new_hbm: Any  # [H / 128, T, 2K / pack, pack, 128]; where compiled, u32 words [H / 128, T, 2K / pack, 1, 128]
    tree_hbm: Any  # [T, M / 128, 128] f32; None: causal
    cache_in: Any  # aliased to `cache`
    out_hbm: Any  # [T, N / pack, pack, H]
    cache: Any  # [pages of all layers, page_size, 2K / pack, pack, H] HBM
    q: Any  # [2, tile_q, N / pack, pack, H] VMEM
    out: Any  # [2, tile_q, N / pack, pack, H] VMEM
    tree: Any  # [2, tile_q, M / 128, 128] f32 VMEM; None: causal
    kv: Any  # [2, tile_kv, 2K / pack, pack, H] VMEM
    tile: TileRefs
    out_tokens: Any  # [2] i32 SMEM, of the results under way
    q_sems: Any  # [2]
    kv_sems: Any  # [2]
    out_sems: Any  # [2]
    new_sem: Any


class _Item(NamedTuple):
    """A query tile. row == end of the range: none is left."""

    row: jax.Array  # [] i32
    token: jax.Array  # [] i32, its first one among the row's new tokens


class _Span(NamedTuple):
    """Where an item's tokens lie."""

    tokens: jax.Array  # [] i32, in this item
    begin: jax.Array  # [] i32, token row of the first
    first: jax.Array  # [] i32, its position
    context: jax.Array  # [] i32, position of the row's first new token
    kv_len: jax.Array  # [] i32
    first_tile: jax.Array  # [] i32, of keys and values
    end_tile: jax.Array  # [] i32


def _q_len(refs: _Refs, row: jax.Array) -> jax.Array:
    length: jax.Array = refs.cu_q_lens[row + 1] - refs.cu_q_lens[row]
    return length


def _seek(refs: _Refs, row: jax.Array) -> _Item:
    """The first item of the first row from `row` on that has tokens."""
    end = refs.row_range[1]
    row = lax.while_loop(lambda r: (r < end) & (_q_len(refs, jnp.minimum(r, end - 1)) <= 0), lambda r: r + 1, row)
    return _Item(row, jnp.int32(0))


def _fits_small(refs: _Refs, sizes: _Sizes, item: _Item) -> jax.Array:
    return _q_len(refs, item.row) - item.token <= sizes.small.tokens


def _advance(refs: _Refs, sizes: _Sizes, item: _Item) -> _Item:
    """The item after this one."""
    token = item.token + sizes.large.tokens
    more = token < _q_len(refs, item.row)
    following: _Item = lax.cond(more, lambda: _Item(item.row, token), lambda: _seek(refs, item.row + 1))
    return following


def _visible_from(refs: _Refs, sizes: _Sizes, position: jax.Array) -> jax.Array:
    """First position that a query sees."""
    if not sizes.windowed:
        return jnp.zeros((), jnp.int32)
    window = refs.window[0]
    first: jax.Array = jnp.where(window > 0, jnp.maximum(position - window + 1, 0), 0)
    return first


def _span(refs: _Refs, sizes: _Sizes, item: _Item) -> _Span:
    q_len, kv_len = _q_len(refs, item.row), refs.kv_lens[item.row]
    tokens = jnp.minimum(q_len - item.token, sizes.large.tokens)
    context = kv_len - q_len
    first = context + item.token
    return _Span(
        tokens=tokens,
        begin=refs.cu_q_lens[item.row] + item.token,
        first=first,
        context=context,
        kv_len=kv_len,
        first_tile=lax.div(_visible_from(refs, sizes, first), sizes.tile.tile_kv),
        end_tile=lax.div(first + tokens - 1, sizes.tile.tile_kv) + 1,
    )


def _write_range(refs: _Refs, sizes: _Sizes, row: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions [begin, end) of a row's new tokens in a tile."""
    kv_len = refs.kv_lens[row]
    begin = jnp.maximum(tile * sizes.tile.tile_kv, kv_len - _q_len(refs, row))
    return begin, jnp.minimum((tile + 1) * sizes.tile.tile_kv, kv_len)


def _start_write(refs: _Refs, sizes: _Sizes, row: jax.Array, tile: jax.Array) -> None:
    """Copy the new keys and values of one tile into their pages."""
    begin, end = _write_range(refs, sizes, row, tile)
    source = refs.cu_q_lens[row + 1] - refs.kv_lens[row]  # + position = token row
    cache = refs.cache.bitcast(jnp.uint32) if sizes.tile.native else refs.cache

    def one(page: jax.Array, carry: None) -> None:
        low = jnp.maximum(begin, page * sizes.page_size)
        count = jnp.minimum(end, (page + 1) * sizes.page_size) - low
        page_id = refs.base_page[0] + refs.page_table[row * sizes.pages + page]
        places = pl.ds(low - page * sizes.page_size, count)
        for fold in range(refs.new_hbm.shape[0]):
            lanes = pl.ds(fold * _LANES, _LANES)
            target = cache.at[page_id, places, slice(None), slice(None), lanes]
            pltpu.make_async_copy(refs.new_hbm.at[fold, pl.ds(source + low, count)], target, refs.new_sem).start()

    lax.fori_loop(lax.div(begin, sizes.page_size), lax.div(end - 1, sizes.page_size) + 1, one, None)


def _start_first_write(refs: _Refs, sizes: _Sizes, item: _Item) -> None:
    """The same for the first tile of a row that has new tokens."""

    @pl.when(item.row < refs.row_range[1])
    def _() -> None:
        context = refs.kv_lens[item.row] - _q_len(refs, item.row)
        _start_write(refs, sizes, item.row, lax.div(context, sizes.tile.tile_kv))


def _await_write(refs: _Refs, sizes: _Sizes, row: jax.Array, tile: jax.Array) -> None:
    """Wait for the new tokens of a tile; then start to write those of the next one, of this row or the next."""
    begin, end = _write_range(refs, sizes, row, tile)
    for fold in range(refs.new_hbm.shape[0]):
        written = refs.new_hbm.at[fold, pl.ds(0, end - begin)]
        pltpu.make_async_copy(written, written, refs.new_sem).wait()
    more = end < refs.kv_lens[row]
    pl.when(more)(lambda: _start_write(refs, sizes, row, tile + 1))
    pl.when(jnp.logical_not(more))(lambda: _start_first_write(refs, sizes, _seek(refs, row + 1)))


def _tile_pages(refs: _Refs, sizes: _Sizes, span: _Span, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pages [begin, end) of a tile, counted in it, that hold tokens which the item sees."""
    first = tile * sizes.tile_pages
    begin = lax.div(_visible_from(refs, sizes, span.first), sizes.page_size) - first
    end = lax.div(span.first + span.tokens + sizes.page_size - 1, sizes.page_size) - first
    return jnp.maximum(begin, 0), jnp.minimum(end, sizes.tile_pages)


def _start_fetch(refs: _Refs, sizes: _Sizes, slot: jax.Array, item: _Item, tile: jax.Array) -> None:
    """Start to copy the pages of a tile. Its new tokens are in them before."""
    span = _span(refs, sizes, item)
    has_new = (tile + 1) * sizes.tile.tile_kv > span.context
    seen_before = (item.token > 0) & (tile <= lax.div(span.first - 1, sizes.tile.tile_kv))
    pl.when(has_new & jnp.logical_not(seen_before))(lambda: _await_write(refs, sizes, item.row, tile))
    begin, end = _tile_pages(refs, sizes, span, tile)
    places = item.row * sizes.pages + tile * sizes.tile_pages

    def one(page: jax.Array, carry: None) -> None:
        page_id = refs.base_page[0] + refs.page_table[places + page]
        start = pl.multiple_of(page * sizes.page_size, sizes.page_size)
        target = refs.kv.at[slot, pl.ds(start, sizes.page_size)]
        pltpu.make_async_copy(refs.cache.at[page_id], target, refs.kv_sems.at[slot]).start()

    lax.fori_loop(begin, end, one, None)


def _await_fetch(refs: _Refs, sizes: _Sizes, slot: jax.Array, span: _Span, tile: jax.Array) -> None:
    begin, end = _tile_pages(refs, sizes, span, tile)
    copied = refs.kv.at[slot, pl.ds(0, (end - begin) * sizes.page_size)]
    pltpu.make_async_copy(copied, copied, refs.kv_sems.at[slot]).wait()


def _query_copies(refs: _Refs, sizes: _Sizes, slot: jax.Array, item: _Item) -> list[Any]:
    span = _span(refs, sizes, item)
    source, target = pl.ds(span.begin, span.tokens), pl.ds(0, span.tokens)
    copies = [pltpu.make_async_copy(refs.q_hbm.at[source], refs.q.at[slot, target], refs.q_sems.at[slot])]
    if refs.tree is not None:
        copies.append(pltpu.make_async_copy(refs.tree_hbm.at[source], refs.tree.at[slot, target], refs.q_sems.at[slot]))
    return copies


def _scale_queries(refs: _Refs, sizes: _Sizes, shape: TileShape, slot: jax.Array) -> None:
    """Take the heads out of the packed query tokens; see `TileRefs.queries`."""
    factor = refs.kv_scales[0] * sizes.scale
    tokens = refs.q.at[slot]
    pack, num_heads = refs.q.shape[3], refs.tile.queries.shape[0]

    def one(word: jax.Array, carry: None) -> None:
        for index, head in enumerate(head_rows.load_heads(tokens, word, shape.tokens, sizes.tile.native)):
            scaled = (head * factor).astype(refs.tile.queries.dtype)
            refs.tile.queries[word * pack + index, pl.ds(0, shape.tokens)] = scaled

    lax.fori_loop(0, num_heads // pack, one, None, unroll=math.gcd(num_heads // pack, _UNROLL))


def _store_results(refs: _Refs, sizes: _Sizes, shape: TileShape, slot: jax.Array) -> None:
    """Pack the results of all heads."""
    tokens = refs.out.at[slot]
    pack, num_heads = refs.q.shape[3], refs.tile.queries.shape[0]

    def one(word: jax.Array, carry: None) -> None:
        heads = [
            refs.tile.queries[word * pack + index, pl.ds(0, shape.tokens)].astype(jnp.float32) for index in range(pack)
        ]
        head_rows.store_heads(tokens, word, heads, sizes.tile.native)

    lax.fori_loop(0, num_heads // pack, one, None, unroll=math.gcd(num_heads // pack, _UNROLL))


def _tree_rows(refs: _Refs, sizes: _Sizes, shape: TileShape, slot: jax.Array, block: int) -> jax.Array:
    """Custom mask of the queries of a lane group: [lanes, M] f32."""
    rows = head_rows.load_rows(refs.tree.at[slot], shape.tokens, sizes.tile.native)
    rows = rows[block * shape.lanes : (block + 1) * shape.lanes] if shape.heads == 1 else rows
    return jnp.concatenate([rows] * shape.heads)


def _fill_bias(refs: _Refs, sizes: _Sizes, shape: TileShape, span: _Span, tile: jax.Array, slot: jax.Array) -> None:
    """Make the masks of a tile for all heads; see `TileRefs.bias`."""
    begin = tile * sizes.tile.tile_kv
    plane = (sizes.tile.tile_kv, shape.lanes)
    key = begin + lax.broadcasted_iota(jnp.int32, plane, 0)
    lane = lax.broadcasted_iota(jnp.int32, (1, shape.lanes), 1)
    for block in range(shape.blocks):
        query = span.first + block * shape.lanes + lax.rem(lane, shape.tokens)
        visible = key <= query
        if sizes.windowed:
            visible &= key > query - jnp.where(refs.window[0] > 0, refs.window[0], _FAR)
        if refs.tree is not None:
            tree = _tree_rows(refs, sizes, shape, slot, block)
            column = lax.broadcasted_iota(jnp.int32, (plane[0], tree.shape[1]), 1)
            row = span.context + column
            place = begin + lax.broadcasted_iota(jnp.int32, row.shape, 0)
            chosen = jnp.where(row == place, 1.0, 0.0)
            seen = lax.dot_general(chosen, tree, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            visible &= jnp.where(key < span.context, 1.0, seen) > 0.5
        refs.tile.bias[block, :, pl.ds(0, shape.lanes)] = jnp.where(visible, 0.0, MASKED)


def _attend(
    refs: _Refs, sizes: _Sizes, shape: TileShape, span: _Span, tile: jax.Array, slots: tuple[jax.Array, jax.Array]
) -> None:
    """One tile of keys and values, with masks where some query does not see all of it."""
    kv_slot, q_slot = slots
    begin, end = tile * sizes.tile.tile_kv, (tile + 1) * sizes.tile.tile_kv
    whole = (end - 1 <= span.first) & (_visible_from(refs, sizes, span.first + span.tokens - 1) <= begin)
    if refs.tree is not None:
        whole &= end <= span.context
    tokens = refs.kv.at[kv_slot]

    @pl.when(whole)
    def _() -> None:
        prefill_tile.attend(refs.tile, sizes.tile, shape, tokens, None, masked=False)

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        _fill_bias(refs, sizes, shape, span, tile, q_slot)
        valid = (_visible_from(refs, sizes, span.first) - begin, span.first + span.tokens - begin)
        prefill_tile.attend(refs.tile, sizes.tile, shape, tokens, valid, masked=True)


def _store_copy(refs: _Refs, slot: jax.Array, begin: jax.Array, tokens: jax.Array) -> Any:
    return pltpu.make_async_copy(
        refs.out.at[slot, pl.ds(0, tokens)], refs.out_hbm.at[pl.ds(begin, tokens)], refs.out_sems.at[slot]
    )


def _await_store(refs: _Refs, slot: jax.Array) -> None:
    """Wait until the results that last left a slot are gone."""
    tokens = refs.out_tokens[slot]
    pl.when(tokens > 0)(lambda: _store_copy(refs, slot, jnp.int32(0), tokens).wait())
    refs.out_tokens[slot] = 0


def _run_item(refs: _Refs, sizes: _Sizes, item: _Item, following: _Item, q_slot: jax.Array, step: jax.Array) -> None:
    """One query tile. Its queries are on their way to `q_slot`, its first keys and values to slot `step % 2`."""
    span = _span(refs, sizes, item)
    for copy in _query_copies(refs, sizes, q_slot, item):
        copy.wait()
    has_following = following.row < refs.row_range[1]

    @pl.when(has_following)
    def _() -> None:
        for copy in _query_copies(refs, sizes, 1 - q_slot, following):
            copy.start()

    def run(shape: TileShape) -> None:
        _scale_queries(refs, sizes, shape, q_slot)
        prefill_tile.begin(refs.tile, sizes.tile, shape, refs.sinks)

        def one(tile: jax.Array, carry: None) -> None:
            slot = lax.rem(step + tile - span.first_tile, 2)
            last = tile + 1 == span.end_tile
            pl.when(jnp.logical_not(last))(lambda: _start_fetch(refs, sizes, 1 - slot, item, tile + 1))

            @pl.when(last & has_following)
            def _() -> None:
                _start_fetch(refs, sizes, 1 - slot, following, _span(refs, sizes, following).first_tile)

            _await_fetch(refs, sizes, slot, span, tile)
            _attend(refs, sizes, shape, span, tile, (slot, q_slot))

        lax.fori_loop(span.first_tile, span.end_tile, one, None)
        prefill_tile.finish(refs.tile, sizes.tile, shape, refs.kv_scales[1])
        _await_store(refs, q_slot)
        _store_results(refs, sizes, shape, q_slot)

    if sizes.small == sizes.large:
        run(sizes.large)
    else:
        small = _fits_small(refs, sizes, item)
        pl.when(small)(lambda: run(sizes.small))
        pl.when(jnp.logical_not(small))(lambda: run(sizes.large))
    _store_copy(refs, q_slot, span.begin, span.tokens).start()
    refs.out_tokens[q_slot] = span.tokens


def _clear_padding(refs: _Refs, sizes: _Sizes) -> None:
    """Zero the results of the token rows beyond the last sequence's."""
    begin, end = refs.cu_q_lens[sizes.rows], refs.out_hbm.shape[0]
    count = lax.div(end - begin + sizes.large.tokens - 1, sizes.large.tokens)

    @pl.when(count > 0)
    def _() -> None:
        def clear(token: jax.Array, carry: None) -> None:
            refs.out[0, token] = jnp.zeros(refs.out.shape[2:], refs.out.dtype)

        def chunk(index: jax.Array) -> Any:
            first = begin + index * sizes.large.tokens
            return _store_copy(refs, jnp.int32(0), first, jnp.minimum(end - first, sizes.large.tokens))

        lax.fori_loop(0, jnp.minimum(end - begin, sizes.large.tokens), clear, None)
        lax.fori_loop(0, count, lambda index, carry: chunk(index).start(), None)
        lax.fori_loop(0, count, lambda index, carry: chunk(index).wait(), None)


def _kernel(refs: _Refs, sizes: _Sizes) -> None:
    """Walk the items; see the module."""
    for slot in range(2):
        refs.out_tokens[slot] = 0
        ones = jnp.ones((sizes.tile.sum_rows, sizes.tile.tile_kv), refs.tile.values.dtype)
        refs.tile.values[slot, sizes.tile.head_rows :] = ones
    first = _seek(refs, refs.row_range[0])
    end = refs.row_range[1]

    @pl.when(first.row < end)
    def _() -> None:
        _start_first_write(refs, sizes, first)
        for copy in _query_copies(refs, sizes, jnp.int32(0), first):
            copy.start()
        _start_fetch(refs, sizes, jnp.int32(0), first, _span(refs, sizes, first).first_tile)

    def body(carry: tuple[_Item, jax.Array, jax.Array]) -> tuple[_Item, jax.Array, jax.Array]:
        item, q_slot, step = carry
        following = _advance(refs, sizes, item)
        _run_item(refs, sizes, item, following, q_slot, step)
        span = _span(refs, sizes, item)
        return following, 1 - q_slot, lax.rem(step + span.end_tile - span.first_tile, 2)

    lax.while_loop(lambda carry: carry[0].row < end, body, (first, jnp.int32(0), jnp.int32(0)))
    for slot in range(2):
        _await_store(refs, jnp.int32(slot))
    _clear_padding(refs, sizes)


def small_tile(group: int, tile_q: int) -> TileShape:
    """Shape of the tile for few tokens: 128 queries, of as many heads of a group as fit."""
    heads = min(math.gcd(group, _LANES), 8)
    return TileShape(min(_LANES // heads, tile_q), _LANES)


def prefill(  # noqa: PLR0913
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    layer: jax.Array | int,
    rows: Rows,
    scoring: Scoring,
    *,
    tiles: PrefillTiles,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Append each sequence's new tokens to the cache and attend with all of them; `reference` is the definition.

    Args:
        q: [T, N, H] bf16 or f32, rows of one sequence after the other.
        k: [T, K, H] of the same tokens, after rotary embedding.
        v: [T, K, H].
        cache: [L, num_pages, page_size, 2K / pack, pack, align(H, 128)] f32, bf16, int8 or fp8. Donated: written in
            place. Places that no query sees may hold anything, NaN too.
        layer: [] i32, the layer.
        rows: of which `page_ids` and `offsets` are not read; the rows before `num_decode` are left out, the results of
            their tokens are not written. A row without tokens is skipped.
        scoring: scale, window and the like.
        tiles: from `tuned`.
        interpret: False, or `pltpu.InterpretParams`.

    Returns:
        [T, N, H] in q's dtype, zeros in the rows beyond cu_q_lens[B]; the cache.

    Raises:
        ValueError: shapes or tiles do not fit.
    """
    num_tokens, num_heads, head_dim = q.shape
    pages = cache.reshape(-1, *cache.shape[2:])
    _check(q, k.shape[1], pages, tiles)
    sizes = _sizes(q, k.shape[1], pages.shape[1], rows, scoring, tiles, interpret is False)
    width = pages.shape[4]
    q_pack = 4 // q.dtype.itemsize
    heads = -(-num_heads // q_pack) * q_pack
    queries = _pad_to(q, (num_tokens, heads, width)).reshape(num_tokens, heads // q_pack, q_pack, width)
    new = _packed_new(k, v, pages, scoring, interpret is False)
    num_rows = jnp.full((1,), sizes.rows, jnp.int32)
    num_decode = jnp.zeros_like(num_rows) if rows.num_decode is None else rows.num_decode.reshape(1)
    scales = [1.0 if scale is None else scale for scale in (scoring.k_scale, scoring.v_scale)]
    inputs = [
        rows.cu_q_lens,
        rows.kv_lens,
        rows.page_table.reshape(-1),
        jnp.reshape(layer * cache.shape[1], (1,)).astype(jnp.int32),
        jnp.concatenate([num_decode, num_rows]),
        jnp.asarray(scoring.window, jnp.int32).reshape(1),
        jnp.stack([jnp.asarray(scale, jnp.float32).reshape(()) for scale in scales]),
        None if scoring.sinks is None else scoring.sinks.astype(jnp.float32) * _LOG2_E,
        queries,
        new,
        None if scoring.custom_mask is None else _packed_tree(scoring.custom_mask),
        pages,
    ]
    out, pages = _call(inputs, sizes, interpret)
    return out.reshape(num_tokens, heads, width)[:, :num_heads, :head_dim], pages.reshape(cache.shape)


def _packed_new(k: jax.Array, v: jax.Array, pages: jax.Array, scoring: Scoring, native: bool) -> jax.Array:
    """New keys and values as in the cache, by 128 lanes; see `_Refs.new_hbm`."""
    words, pack, width = pages.shape[2:]
    layout = kv_words.WordLayout(kv_heads=k.shape[1], words=words, pack=pack, width=width)
    keys = k if scoring.k_scale is None else k.astype(jnp.float32) / scoring.k_scale
    values = v if scoring.v_scale is None else v.astype(jnp.float32) / scoring.v_scale
    packed = kv_words.pack_words(keys, values, layout, pages.dtype)
    folds = jnp.stack([packed[:, :, lane : lane + _LANES] for lane in range(0, width, _LANES)])
    if native:
        return folds[:, :, :, None]
    parts = lax.bitcast_convert_type(folds, pages.dtype)
    return parts[:, :, :, None] if pack == 1 else jnp.swapaxes(parts, 3, 4)


def _packed_tree(custom_mask: jax.Array) -> jax.Array:
    """[T, M / 128, 128] f32 of [T, M] bool."""
    num_tokens, columns = custom_mask.shape
    whole = -(-columns // _LANES)
    return _pad_to(custom_mask.astype(jnp.float32), (num_tokens, whole * _LANES)).reshape(num_tokens, whole, _LANES)


def _call(inputs: list[jax.Array | None], sizes: _Sizes, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """Run the kernel on the inputs, which are in the order of `_Refs`; its scratch is too."""
    present = [array for array in inputs if array is not None]
    queries, new, tree, cache = inputs[-4:]
    assert queries is not None and new is not None and cache is not None
    tile_q, tile_kv = sizes.large.tokens, sizes.tile.tile_kv
    local = [
        pltpu.VMEM((2, tile_q, *queries.shape[1:]), queries.dtype),
        pltpu.VMEM((2, tile_q, *queries.shape[1:]), queries.dtype),
        *([] if tree is None else [pltpu.VMEM((2, tile_q, *tree.shape[1:]), tree.dtype)]),
        pltpu.VMEM((2, tile_kv, *cache.shape[2:]), cache.dtype),
    ]
    tile = _tile_scratch(sizes, queries.shape[1] * queries.shape[2], queries.shape[3], queries.dtype)
    tail = [pltpu.SMEM((2,), jnp.int32), *[pltpu.SemaphoreType.DMA((2,))] * 3, pltpu.SemaphoreType.DMA]

    def kernel(*refs: Any) -> None:
        rest = iter(refs)
        fields: list[Any] = [None if array is None else next(rest) for array in inputs]
        fields += [next(rest) for _ in range(4)]  # out, cache, q, out
        fields += [None if tree is None else next(rest), next(rest)]
        fields += [TileRefs(*[next(rest) for _ in tile]), *rest]
        _kernel(_Refs(*fields), sizes)

    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    num_hbm = 3 if tree is None else 4
    vmem_bytes = sum(math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize for ref in [*local, *tile])
    out, cache = pl.pallas_call(
        kernel,
        name="paged_attention_prefill",
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (queries, cache)],
        in_specs=[smem] * (len(present) - num_hbm) + [hbm] * num_hbm,
        out_specs=[hbm, hbm],
        scratch_shapes=[*local, *tile, *tail],
        input_output_aliases={len(present) - 1: 1},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_bytes + _SPILL_BYTES, disable_bounds_checks=True),
        interpret=interpret,
    )(*present)
    return out, cache


def _tile_scratch(sizes: _Sizes, heads: int, width: int, dtype: Any) -> TileRefs:
    """VMEM of `prefill_tile`."""
    large, tile = sizes.large, sizes.tile
    lanes = max(large.lanes, sizes.small.lanes)
    groups = tile.kv_heads * max(tile.lane_groups(large), tile.lane_groups(sizes.small))
    out_rows = tile.head_rows + tile.sum_rows
    return TileRefs(
        queries=pltpu.VMEM((heads, large.tokens, width), dtype),
        keys=pltpu.VMEM((2, tile.tile_kv, width), dtype),
        values=pltpu.VMEM((2, out_rows, tile.tile_kv), dtype),
        scores=pltpu.VMEM((tile.lookahead + 1, tile.tile_kv, lanes), jnp.float32),
        bias=pltpu.VMEM((large.blocks, tile.tile_kv, lanes), jnp.float32),
        acc=pltpu.VMEM((groups, out_rows, lanes), jnp.float32),
        tops=pltpu.VMEM((groups, 1, lanes), jnp.float32),
    )


def _sizes(
    q: jax.Array,
    kv_heads: int,
    page_size: int,
    rows: Rows,
    scoring: Scoring,
    tiles: PrefillTiles,
    native: bool,
) -> _Sizes:
    num_tokens, num_heads, head_dim = q.shape
    soft_cap = scoring.soft_cap
    small = small_tile(num_heads // kv_heads, tiles.tile_q)
    tile = TileSizes(
        group=num_heads // kv_heads,
        kv_heads=kv_heads,
        head_rows=-(-head_dim // _ROWS) * _ROWS,
        sum_rows=_ROWS,
        tile_kv=tiles.tile_kv,
        sub_kv=tiles.sub_kv,
        lookahead=tiles.lookahead,
        body_heads=tiles.body_heads,
        soft_cap=None if soft_cap is None else soft_cap * _LOG2_E,
        native=native,
    )
    return _Sizes(
        rows=rows.kv_lens.shape[0],
        pages=rows.page_table.shape[1],
        page_size=page_size,
        large=small if num_tokens <= small.tokens else TileShape(tiles.tile_q, tiles.lanes),
        small=small,
        tile=tile,
        scale=scoring.scale * _LOG2_E if soft_cap is None else scoring.scale / soft_cap,
        windowed=not (isinstance(scoring.window, int) and scoring.window == 0),
    )


def _check(q: jax.Array, kv_heads: int, cache: jax.Array, tiles: PrefillTiles) -> None:
    """Raise a ValueError that names what does not fit."""
    page_size, words, pack, width = cache.shape[1:]
    if q.shape[1] % kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, not a multiple of the {kv_heads} KV heads")
    if words * pack != -(-2 * kv_heads // pack) * pack or pack != 4 // cache.dtype.itemsize:
        raise ValueError(f"cache of shape {cache.shape} and dtype {cache.dtype} does not hold {kv_heads} KV heads")
    if width % _LANES or width < q.shape[2]:
        raise ValueError(f"cache rows of {width} do not hold a head_dim of {q.shape[2]} aligned to {_LANES}")
    if tiles.tile_kv % page_size or tiles.tile_kv % tiles.sub_kv or tiles.tile_kv % _LANES or tiles.sub_kv % _ROWS:
        raise ValueError(f"tile_kv {tiles.tile_kv} does not fit pages of {page_size} and sub_kv {tiles.sub_kv}")
    if tiles.lanes % _LANES or tiles.tile_q % tiles.lanes:
        raise ValueError(f"tile_q {tiles.tile_q} is not a multiple of lanes {tiles.lanes}, or those not of {_LANES}")
    if kv_heads % tiles.body_heads:
        raise ValueError(f"body_heads {tiles.body_heads} does not divide {kv_heads} KV heads")


def _pad_to(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(array, [(0, to - size) for size, to in zip(array.shape, shape, strict=True)])
