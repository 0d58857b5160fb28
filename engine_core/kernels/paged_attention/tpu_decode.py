"""Paged attention of decode on TPU: one query token for each sequence, its key and value put into the cache on the way.

One kernel instance walks a list of *items*: `tile_kv` tokens of one sequence after the other, sequence after sequence,
empty rows skipped. Pages come by DMA into a ring of `num_buffers` item slots. Iteration i of the loop
  - starts the copies of item i + num_buffers - 1 (which may belong to a later sequence),
  - multiplies the queries with the keys of item i + 1, its scores going to `scores`,
  - turns the scores of item i, read just before they are overwritten, into weights and multiplies those with the values,
  - stores the result if item i was the last of its sequence,
  - waits for item i + 2 and, if it is the last of its sequence, puts the new token's row into it and into the cache.
The two products are independent of each other, so that the compiler overlaps them.

All KV heads of a token stay together: a tile is a matrix of [tokens * K, H] rows in the order of the cache, each query
head is multiplied with all of them, and the scores of other groups' rows are masked. The MXU takes K and V as its
stationary operand, whose loading is the bound in decode, so the additional query rows are free, while no copy, strided
load or shuffle is spent on separating heads. Only K and V are: they share 32-bit words (`kv_words`).

Softmax is online in float32 (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) in base 2.

VMEM: num_buffers * tile_kv tokens of the cache + B query rows + B new cache rows + [N, tile_kv * K] f32 scores.
SMEM: the page table, B * P i32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine_core.kernels.paged_attention import kv_words
from engine_core.kernels.shapes import check_shapes

_MASKED = -1e30
_LOG2_E = math.log2(math.e)
_LANES = 128
_SUBLANES = 8
_ZERO_TOKENS = 8  # cleared at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTiles:
    """Static sizes of the decode kernel.

    Attributes:
        tile_kv: tokens of one item; a multiple of the page size and of `kv_words.block_tokens`.
        num_buffers: slots of the ring, at least 3.
    """

    tile_kv: int
    num_buffers: int


class _Sizes(NamedTuple):
    """Static sizes of one call."""

    rows: int  # B
    heads: int  # N, aligned
    pages: int  # P
    page_size: int
    words: kv_words.WordLayout
    tiles: DecodeTiles
    scale: float  # log2(e) included
    soft_cap: float | None
    windowed: bool
    native: bool  # compiled, not interpreted


class _Refs(NamedTuple):
    """What the kernel sees."""

    kv_lens: Any  # [B] i32 SMEM
    page_table: Any  # [B * P] i32 SMEM
    base_page: Any  # [1] i32 SMEM
    num_decode: Any  # [1] i32 SMEM
    window: Any  # [1] i32 SMEM
    kv_scales: Any  # [2] f32 SMEM
    sinks: Any  # [N, 128] f32 VMEM, in base 2, -inf where there is none
    q_hbm: Any  # [B, N, H]
    new_hbm: Any  # [B, 2K / pack, pack, H]
    cache_in: Any  # aliased to `cache`
    out: Any  # [B, N, H] HBM
    cache: Any  # [pages of all layers, page_size, 2K / pack, pack, H] HBM
    q: Any  # [B, N, H] VMEM; a finished row holds its result
    new: Any  # [B, 2K / pack, pack, H] VMEM
    kv: Any  # [num_buffers, tile_kv, 2K / pack, pack, H] VMEM
    scores: Any  # [N, tile_kv * K] f32 VMEM, base 2, of one item
    weights: Any  # [N, tile_kv * K] VMEM, in q's dtype
    zeros: Any  # [N, H] VMEM
    token_of: Any  # [8, block rows] i32 VMEM: token offset of a score column in its block
    bias: Any  # [N, block rows] f32 VMEM: masks rows of other KV heads
    tops: Any  # [2, N, 128] f32 VMEM: highest score of the sequence so far; of `scores`, by lane
    total: Any  # [N, 128] f32 VMEM: sums of weights, by lane
    acc: Any  # [N, H] f32 VMEM
    items: Any  # [num_buffers, 2] i32 SMEM: row, first position
    kv_sems: Any
    sems: Any  # inputs, results, cache rows


class _Cursor(NamedTuple):
    """The next item to fetch. row == B: none is left."""

    row: jax.Array  # [] i32
    position: jax.Array  # [] i32, of its first token
    sequences: jax.Array  # [] i32, begun so far


_INPUTS, _RESULTS, _NEW_ROWS = range(3)


def _length(refs: _Refs, sizes: _Sizes, row: jax.Array) -> jax.Array:
    """kv_len of a row; 0 beyond the decode rows."""
    inside = row < jnp.minimum(refs.num_decode[0], sizes.rows)
    return jnp.where(inside, refs.kv_lens[jnp.minimum(row, sizes.rows - 1)], 0)


def _first_visible(refs: _Refs, sizes: _Sizes, length: jax.Array) -> jax.Array:
    if not sizes.windowed:
        return jnp.int32(0)
    window = refs.window[0]
    return jnp.where(window > 0, jnp.maximum(length - window, 0), 0)


def _seek(refs: _Refs, sizes: _Sizes, row: jax.Array, sequences: jax.Array) -> _Cursor:
    """Cursor at the first item of the first sequence from `row` on; the empty rows before it get zeros."""

    def clear(row: jax.Array) -> jax.Array:
        pltpu.make_async_copy(refs.zeros, refs.out.at[row], refs.sems.at[_RESULTS]).start()
        return row + 1

    row = lax.while_loop(lambda r: (r < sizes.rows) & (_length(refs, sizes, r) <= 0), clear, row)
    visible = _first_visible(refs, sizes, _length(refs, sizes, row))
    found = (row < sizes.rows).astype(jnp.int32)
    return _Cursor(row, lax.div(visible, sizes.page_size) * sizes.page_size, sequences + found)


def _advance(refs: _Refs, sizes: _Sizes, cursor: _Cursor) -> _Cursor:
    """The item after this one."""
    position = cursor.position + sizes.tiles.tile_kv
    return lax.cond(
        position < _length(refs, sizes, cursor.row),
        lambda: _Cursor(cursor.row, position, cursor.sequences),
        lambda: _seek(refs, sizes, cursor.row + 1, cursor.sequences),
    )


def _cached_tokens(refs: _Refs, sizes: _Sizes, row: jax.Array, position: jax.Array) -> jax.Array:
    """Tokens of an item that come from the cache: all but the new one."""
    return jnp.clip(refs.kv_lens[row] - 1 - position, 0, sizes.tiles.tile_kv)


def _fetch(refs: _Refs, sizes: _Sizes, slot: jax.Array, cursor: _Cursor) -> None:
    """Start an item's copies: of each page the tokens that exist.

    There is no branch: an absent page is replaced by one token of the item's first page.
    """
    refs.items[slot, 0] = cursor.row
    refs.items[slot, 1] = cursor.position
    size = sizes.page_size
    cached = _cached_tokens(refs, sizes, cursor.row, cursor.position)
    first = cursor.row * sizes.pages + lax.div(cursor.position, size)
    for page in range(sizes.tiles.tile_kv // size):
        place = first + jnp.where(page * size < cached, page, 0)
        tokens = pl.ds(0, jnp.clip(cached - page * size, 1, size))
        pltpu.make_async_copy(
            refs.cache.at[refs.base_page[0] + refs.page_table[place], tokens],
            refs.kv.at[slot, pl.ds(page * size, tokens.size)],
            refs.kv_sems.at[slot],
        ).start()


def _await(refs: _Refs, sizes: _Sizes, slot: jax.Array) -> None:
    """Wait for all of an item's copies at once."""
    size, tile = sizes.page_size, sizes.tiles.tile_kv
    cached = _cached_tokens(refs, sizes, refs.items[slot, 0], refs.items[slot, 1])
    copied = refs.kv.at[slot, pl.ds(0, cached + tile // size - lax.div(cached + size - 1, size))]
    pltpu.make_async_copy(copied, copied, refs.kv_sems.at[slot]).wait()


def _clear(refs: _Refs, sizes: _Sizes, slot: jax.Array, begin: jax.Array, end: jax.Array) -> None:
    """Zero the tokens [begin, end) of a slot: a weight of zero does not protect from a NaN."""
    _, _, words, pack, width = refs.kv.shape

    def one(token: jax.Array, carry: None) -> None:
        refs.kv[slot, token] = jnp.zeros((words, pack, width), refs.kv.dtype)

    def many(block: jax.Array, carry: None) -> None:
        kv_words.clear(refs.kv.at[slot], sizes.words, block * _ZERO_TOKENS, _ZERO_TOKENS, sizes.native)

    first = jnp.minimum(lax.div(begin + _ZERO_TOKENS - 1, _ZERO_TOKENS), lax.div(end, _ZERO_TOKENS))
    last = jnp.maximum(first, lax.div(end, _ZERO_TOKENS))
    lax.fori_loop(begin, jnp.minimum(end, jnp.maximum(begin, first * _ZERO_TOKENS)), one, None)
    lax.fori_loop(first, last, many, None)
    lax.fori_loop(jnp.maximum(begin, last * _ZERO_TOKENS), end, one, None)


def _complete(refs: _Refs, sizes: _Sizes, slot: jax.Array) -> None:
    """Make an item that has arrived fit for use: the new token in its place, here and in the cache; no leftovers."""
    row, position = refs.items[slot, 0], refs.items[slot, 1]
    length = refs.kv_lens[row]
    tokens = length - position

    @pl.when(tokens <= sizes.tiles.tile_kv)
    def _() -> None:
        place = lax.div(length - 1, sizes.page_size)
        page = refs.base_page[0] + refs.page_table[row * sizes.pages + place]
        target = refs.cache.at[page, length - 1 - place * sizes.page_size]
        pltpu.make_async_copy(refs.new.at[row], target, refs.sems.at[_NEW_ROWS]).start()
        refs.kv[slot, tokens - 1] = refs.new[row]
        _clear(refs, sizes, slot, tokens, jnp.int32(sizes.tiles.tile_kv))

    if sizes.windowed:
        hidden = jnp.minimum(_first_visible(refs, sizes, length) - position, sizes.tiles.tile_kv)
        pl.when(hidden > 0)(lambda: _clear(refs, sizes, slot, jnp.int32(0), hidden))


def _score_block(refs: _Refs, sizes: _Sizes, slot: jax.Array, q: jax.Array, block: int) -> jax.Array:
    """Scores [N, block rows] of one block of keys, base 2, masked; also stored."""
    row, position = refs.items[slot, 0], refs.items[slot, 1]
    length = refs.kv_lens[row]
    begin = position + block * sizes.words.block_tokens
    keys = kv_words.load(refs.kv.at[slot], sizes.words, block, kv_words.KEY, q.dtype, sizes.native)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = lax.dot_general(
        q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=precision
    )
    if sizes.soft_cap is None:
        scores = scores * (sizes.scale * _LOG2_E * refs.kv_scales[0])
    else:
        scores = jnp.tanh(scores * (sizes.scale / sizes.soft_cap * refs.kv_scales[0])) * (sizes.soft_cap * _LOG2_E)
    token = refs.token_of[0:1, :]
    visible = token < length - begin
    if sizes.windowed:
        visible &= token >= _first_visible(refs, sizes, length) - begin
    scores = scores + refs.bias[...] + jnp.where(visible, 0.0, _MASKED)
    refs.scores[:, _columns(sizes, block)] = scores
    return scores


def _fold(values: jax.Array, combine: Any) -> jax.Array:
    """[N, n * 128] to [N, 128]: combine the groups of lanes."""
    groups = [values[:, at : at + _LANES] for at in range(0, values.shape[1], _LANES)]
    return functools.reduce(combine, groups)


def _columns(sizes: _Sizes, block: int) -> slice:
    return slice(block * sizes.words.block_rows, (block + 1) * sizes.words.block_rows)


def _weigh(refs: _Refs, sizes: _Sizes) -> jax.Array:
    """Turn `scores` into `weights`, and return the decay [N, 1] of what was summed before; `total` follows."""
    top = jnp.maximum(refs.tops[0], refs.tops[1].max(axis=1, keepdims=True))
    decay = jnp.exp2(refs.tops[0] - top)
    total = refs.total[...] * decay
    for block in range(_num_blocks(sizes)):
        weights = jnp.exp2(refs.scores[:, _columns(sizes, block)] - top[:, :1])
        refs.weights[:, _columns(sizes, block)] = weights.astype(refs.weights.dtype)
        total += _fold(weights, jnp.add)
    refs.total[...] = total
    refs.tops[0] = top
    return decay[:, :1]


def _score(refs: _Refs, sizes: _Sizes, slot: jax.Array) -> None:
    """Fill `scores` from the keys of an item, and the highest of them by lane."""
    q = refs.q[refs.items[slot, 0]]
    highest = [_fold(_score_block(refs, sizes, slot, q, block), jnp.maximum) for block in range(_num_blocks(sizes))]
    refs.tops[1] = functools.reduce(jnp.maximum, highest)


def _mix(refs: _Refs, sizes: _Sizes, slot: jax.Array, decay: jax.Array) -> None:
    """Add the values of an item, by their weights."""
    dtype = refs.weights.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    acc = refs.acc[...] * decay
    for block in range(_num_blocks(sizes)):
        values = kv_words.load(refs.kv.at[slot], sizes.words, block, kv_words.VALUE, dtype, sizes.native)
        weights = refs.weights[:, _columns(sizes, block)]
        acc += jnp.dot(weights, values, preferred_element_type=jnp.float32, precision=precision)
    refs.acc[...] = acc


def _num_blocks(sizes: _Sizes) -> int:
    return sizes.tiles.tile_kv // sizes.words.block_tokens


def _attend(refs: _Refs, sizes: _Sizes, slot: jax.Array, following: jax.Array) -> None:
    """Finish the item in `slot`, score the one in `following`. Straight-line code.

    The order is the one in which the latencies of the MXU and of the reduction over lanes hide behind other work.
    """
    decay = _weigh(refs, sizes)
    _score(refs, sizes, following)
    _mix(refs, sizes, slot, decay)


def _begin_sequence(refs: _Refs) -> None:
    """The carry before a sequence's first item. A sink is a score whose value is zero."""
    sinks = refs.sinks[...]
    lane = lax.broadcasted_iota(jnp.int32, sinks.shape, 1)
    refs.tops[0] = sinks
    refs.total[...] = jnp.where((lane == 0) & (sinks > _MASKED), 1.0, 0.0)
    refs.acc[...] = jnp.zeros(refs.acc.shape, jnp.float32)


def _finish(refs: _Refs, sizes: _Sizes, slot: jax.Array) -> None:
    """After the last item of a sequence: its result goes out."""
    row, position = refs.items[slot, 0], refs.items[slot, 1]

    @pl.when(refs.kv_lens[row] - position <= sizes.tiles.tile_kv)
    def _() -> None:
        total = refs.total[...].sum(axis=1, keepdims=True)
        refs.q[row] = (refs.acc[...] * (refs.kv_scales[1] / total)).astype(refs.q.dtype)
        pltpu.make_async_copy(refs.q.at[row], refs.out.at[row], refs.sems.at[_RESULTS]).start()
        _begin_sequence(refs)


def _constants(refs: _Refs, sizes: _Sizes, num_heads: int) -> None:
    """Fill `token_of`, `bias` and `zeros`."""
    refs.zeros[...] = jnp.zeros(refs.zeros.shape, refs.zeros.dtype)
    refs.token_of[...] = kv_words.tokens_of_rows(sizes.words, refs.token_of.shape)
    head = kv_words.heads_of_rows(sizes.words, refs.bias.shape)
    group = num_heads // sizes.words.kv_heads
    query_head = lax.broadcasted_iota(jnp.int32, refs.bias.shape, 0)
    refs.bias[...] = jnp.where(lax.div(query_head, group) == head, 0.0, _MASKED)


def _kernel(*all_refs: Any, sizes: _Sizes, num_heads: int) -> None:
    refs = _Refs(*all_refs)
    ring = sizes.tiles.num_buffers
    inputs = [
        pltpu.make_async_copy(source, target, refs.sems.at[_INPUTS])
        for source, target in ((refs.q_hbm, refs.q), (refs.new_hbm, refs.new))
    ]
    for copy in inputs:
        copy.start()
    _constants(refs, sizes, num_heads)
    for slot in range(ring):
        refs.items[slot, 0] = 0
        refs.items[slot, 1] = 0

    def ahead(slot: jax.Array, by: int) -> jax.Array:
        return lax.rem(slot + by, ring)

    cursor = _seek(refs, sizes, jnp.int32(0), jnp.int32(0))
    fetched = jnp.int32(0)
    for slot in range(ring - 1):

        def fetch(cursor: _Cursor = cursor, slot: int = slot) -> _Cursor:
            _fetch(refs, sizes, jnp.int32(slot), cursor)
            return _advance(refs, sizes, cursor)

        fetched += (cursor.row < sizes.rows).astype(jnp.int32)
        cursor = lax.cond(cursor.row < sizes.rows, fetch, lambda cursor=cursor: cursor)
    for copy in inputs:
        copy.wait()
    _begin_sequence(refs)

    def arrive(index: jax.Array, slot: jax.Array, fetched: jax.Array) -> None:
        @pl.when(index < fetched)
        def _() -> None:
            _await(refs, sizes, slot)
            _complete(refs, sizes, slot)

    arrive(jnp.int32(0), jnp.int32(0), fetched)
    arrive(jnp.int32(1), jnp.int32(1), fetched)
    pl.when(fetched > 0)(lambda: _score(refs, sizes, jnp.int32(0)))

    def steady(carry: tuple[jax.Array, _Cursor]) -> tuple[jax.Array, _Cursor]:
        index, cursor = carry
        slot = lax.rem(index, ring)
        _fetch(refs, sizes, ahead(slot, ring - 1), cursor)
        _attend(refs, sizes, slot, ahead(slot, 1))
        _finish(refs, sizes, slot)
        _await(refs, sizes, ahead(slot, 2))
        _complete(refs, sizes, ahead(slot, 2))
        return index + 1, _advance(refs, sizes, cursor)

    index, cursor = lax.while_loop(lambda carry: carry[1].row < sizes.rows, steady, (jnp.int32(0), cursor))
    fetched += index

    def drain(index: jax.Array, carry: None) -> None:
        slot = lax.rem(index, ring)
        _attend(refs, sizes, slot, ahead(slot, 1))
        _finish(refs, sizes, slot)
        arrive(index + 2, ahead(slot, 2), fetched)

    lax.fori_loop(index, fetched, drain, None)
    pltpu.make_async_copy(refs.q, refs.q, refs.sems.at[_RESULTS]).wait()
    written = refs.new.at[pl.ds(0, cursor.sequences)]
    pl.when(cursor.sequences > 0)(pltpu.make_async_copy(written, written, refs.sems.at[_NEW_ROWS]).wait)


def _pad_to(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if array.shape == shape:
        return array
    return jnp.pad(array, [(0, after - before) for before, after in zip(array.shape, shape, strict=True)])


def _pack_new(k: jax.Array, v: jax.Array, cache: jax.Array, scales: jax.Array | None) -> jax.Array:
    """[B, *token shape of the cache] of the new keys and values, in the cache's dtype."""
    both = jnp.stack([k, v], axis=2)
    if scales is not None:
        both = both.astype(jnp.float32) / scales[:, None]
        if jnp.issubdtype(cache.dtype, jnp.integer):
            limits = jnp.iinfo(cache.dtype)
            both = jnp.round(both)
        else:
            limits = jnp.finfo(cache.dtype)
        both = jnp.clip(both, float(limits.min), float(limits.max))
    both = both.astype(cache.dtype)
    words, pack, width = cache.shape[2:]
    heads = both.reshape(k.shape[0], 2 * k.shape[1], k.shape[2])
    return _pad_to(heads, (k.shape[0], words * pack, width)).reshape(k.shape[0], words, pack, width)


def decode(
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
    layout = kv_words.WordLayout(kv_heads=k.shape[1], words=words, pack=pack, width=width)
    _check(q, k, cache, layout, tiles)
    scales = None
    if k_scale is not None or v_scale is not None:
        scales = jnp.stack([jnp.asarray(1 if s is None else s, jnp.float32).reshape(()) for s in (k_scale, v_scale)])
    heads = -(-num_heads // _SUBLANES) * _SUBLANES
    sizes = _Sizes(
        rows=num_rows,
        heads=heads,
        pages=page_table.shape[1],
        page_size=page_size,
        words=layout,
        tiles=tiles,
        scale=scale,
        soft_cap=soft_cap,
        windowed=not (isinstance(window, int) and window == 0),
        native=interpret is False,
    )
    sink_rows = jnp.full((num_heads,), _MASKED, jnp.float32) if sinks is None else sinks.astype(jnp.float32) * _LOG2_E
    sink_rows = jnp.broadcast_to(_pad_to(sink_rows, (heads,))[:, None], (heads, _LANES))
    padded = (num_rows, heads, width)
    columns = tiles.tile_kv * layout.heads
    vmem, smem, hbm = (
        pl.BlockSpec(memory_space=space) for space in (pltpu.VMEM, pltpu.SMEM, pl.ANY)
    )
    scratch = [
        pltpu.VMEM(padded, q.dtype),
        pltpu.VMEM((num_rows, words, pack, width), cache.dtype),
        pltpu.VMEM((tiles.num_buffers, tiles.tile_kv, words, pack, width), cache.dtype),
        pltpu.VMEM((heads, columns), jnp.float32),
        pltpu.VMEM((heads, columns), q.dtype),
        pltpu.VMEM(padded[1:], q.dtype),
        pltpu.VMEM((_SUBLANES, layout.block_rows), jnp.int32),
        pltpu.VMEM((heads, layout.block_rows), jnp.float32),
        pltpu.VMEM((2, heads, _LANES), jnp.float32),
        pltpu.VMEM((heads, _LANES), jnp.float32),
        pltpu.VMEM((heads, width), jnp.float32),
        pltpu.SMEM((tiles.num_buffers, 2), jnp.int32),
        pltpu.SemaphoreType.DMA((tiles.num_buffers,)),
        pltpu.SemaphoreType.DMA((3,)),
    ]
    out, cache = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, num_heads=num_heads),
        out_shape=(jax.ShapeDtypeStruct(padded, q.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype)),
        in_specs=[smem] * 6 + [vmem] + [hbm] * 3,
        out_specs=(hbm, hbm),
        scratch_shapes=scratch,
        input_output_aliases={9: 1},
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True, vmem_limit_bytes=_vmem_bytes(sizes, q.dtype, cache.dtype)
        ),
        interpret=interpret,
        name="paged_attention_decode",
    )(
        kv_lens.astype(jnp.int32),
        page_table.astype(jnp.int32).reshape(-1),
        base_page.astype(jnp.int32),
        num_decode.astype(jnp.int32),
        jnp.asarray(window, jnp.int32).reshape(1),
        jnp.ones(2, jnp.float32) if scales is None else scales,
        sink_rows,
        _pad_to(q, padded),
        _pack_new(k, v, cache, scales),
        cache,
    )
    return out[:, :num_heads, :head_dim], cache


def _vmem_bytes(sizes: _Sizes, dtype: Any, storage: Any) -> int:
    """What the kernel needs, with room for the compiler's own."""
    layout, tiles = sizes.words, sizes.tiles
    token = layout.words * layout.pack * layout.width * jnp.dtype(storage).itemsize
    rows = sizes.rows * (token + sizes.heads * layout.width * jnp.dtype(dtype).itemsize)
    ring = tiles.num_buffers * tiles.tile_kv * token
    scores = 8 * sizes.heads * (tiles.tile_kv * layout.heads + layout.block_rows + 4 * layout.width)
    return rows + ring + scores + (8 << 20)


def _check(
    q: jax.Array, k: jax.Array, cache: jax.Array, layout: kv_words.WordLayout, tiles: DecodeTiles
) -> None:
    """Refuse what does not fit together, naming the field."""
    bits = jnp.dtype(cache.dtype).itemsize * 8
    if layout.pack != 32 // bits:
        raise ValueError(f"cache: pack is {layout.pack}, but {cache.dtype} needs {32 // bits}")
    if layout.width % _LANES or q.shape[2] > layout.width:
        raise ValueError(f"cache: rows of {layout.width} do not hold head_dim {q.shape[2]} in multiples of {_LANES}")
    if not 2 * k.shape[1] <= layout.words * layout.pack < 2 * k.shape[1] + layout.pack:
        raise ValueError(f"cache: {layout.words} words of {layout.pack} are not those of {k.shape[1]} KV heads")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q: {q.shape[1]} heads do not divide by {k.shape[1]} KV heads")
    for name, size in (("page_size", cache.shape[1]), ("block_tokens", layout.block_tokens)):
        if tiles.tile_kv % size:
            raise ValueError(f"tiles: tile_kv {tiles.tile_kv} is not a multiple of {name} {size}")
    if tiles.num_buffers < 3:
        raise ValueError(f"tiles: num_buffers must be at least 3, not {tiles.num_buffers}")
