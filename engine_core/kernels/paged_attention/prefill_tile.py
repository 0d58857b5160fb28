"""The arithmetic of prefill attention on TPU: a tile of query tokens against a tile of keys and values, all in VMEM.

Scores are computed transposed, `[tile_kv, lanes]` with a query in each lane, and so are the results, `[H, lanes]`:
  - the weights are the MXU's stationary operand in the second product, 256 x 256 full where a head of 128 would fill
    half of it, and their sum is 16 more rows of ones under the values instead of additions;
  - a query's maximum, decay and sum lie in one lane: reductions run over registers, nothing is broadcast over lanes.
A *lane group* is `lanes` columns of one KV head: `lanes` tokens of one query head or, in the small tile, few tokens of
several query heads. The products of `lookahead` lane groups are begun before the first of them is turned into weights;
the code of a body is straight, so that the compiler overlaps MXU, exponentials and additions.

Softmax is online in float32 (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), in base 2, the scale
multiplied into the queries.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from engine_core.kernels.paged_attention import head_rows

MASKED = -1e30
_UNROLL = 4  # lane groups, so that their latencies overlap
LOWEST = -1e29  # maximum of no scores: far above a masked one, whose weight is therefore 0 and not exp(0)


class TileShape(NamedTuple):
    """A size of query tile: `tokens` of each of `group` query heads, in lane groups of `lanes`."""

    tokens: int
    lanes: int

    @property
    def heads(self) -> int:
        """Query heads in one lane group."""
        return max(1, self.lanes // self.tokens)

    @property
    def blocks(self) -> int:
        """Lane groups that one query head's tokens make."""
        return max(1, self.tokens // self.lanes)


class TileSizes(NamedTuple):
    """Static sizes of one call."""

    group: int  # query heads per KV head
    kv_heads: int  # K
    head_rows: int  # rows of the values, transposed: H aligned to 16
    sum_rows: int  # rows of ones under them
    tile_kv: int
    sub_kv: int  # scores of so many tokens make one product; divides tile_kv
    lookahead: int
    body_heads: int  # KV heads in one loop body; divides kv_heads
    soft_cap: float | None
    native: bool  # compiled, not interpreted

    def lane_groups(self, shape: TileShape) -> int:
        """Of one KV head."""
        return self.group * shape.tokens // shape.lanes


class TileRefs(NamedTuple):
    """VMEM of the arithmetic."""

    queries: Any  # [N, tokens, H] in the compute dtype; scaled; at last the results
    keys: Any  # [2, tile_kv, H]
    values: Any  # [2, head_rows + sum_rows, tile_kv], transposed, ones below
    scores: Any  # [lookahead + 1, tile_kv, lanes] f32
    bias: Any  # [blocks, tile_kv, lanes] f32, 0 or MASKED
    acc: Any  # [K * lane groups, head_rows + sum_rows, lanes] f32
    tops: Any  # [K * lane groups, 1, lanes] f32, highest score so far


class _Group(NamedTuple):
    """A lane group on its way through a body."""

    shape: TileShape
    head: jax.Array  # KV head
    number: int  # lane group of that head
    buffer: int  # of its keys and values
    scores: int  # buffer of its scores
    masked: bool


def attend(refs: TileRefs, sizes: TileSizes, shape: TileShape, tokens: Any, valid: Any, masked: bool) -> None:
    """Add one tile of keys and values to the sums of every query.

    Args:
        refs: see `TileRefs`; `acc` and `tops` change.
        sizes: static.
        shape: of the query tile; static.
        tokens: ref `[tile_kv, 2K / pack, pack, H]`, the packed keys and values.
        valid: [begin, end) of the tokens that some query sees; the others may hold anything. Used where masked.
        masked: whether `bias` applies and `valid` is not all of the tile. Static.
    """

    def body(step: jax.Array, carry: None) -> None:
        groups = [(local, index) for local in range(sizes.body_heads) for index in range(sizes.lane_groups(shape))]
        started: list[tuple[_Group, jax.Array]] = []
        for number, (local, index) in enumerate(groups):
            head = step * sizes.body_heads + local
            if index == 0:
                _unpack(refs, sizes, tokens, head, local % 2, valid if masked else None)
            group = _Group(shape, head, index, local % 2, number % (sizes.lookahead + 1), masked)
            started.append((group, _score(refs, sizes, group)))
            if len(started) > sizes.lookahead:
                _weigh(refs, sizes, *started.pop(0))
        for item in started:
            _weigh(refs, sizes, *item)

    lax.fori_loop(0, sizes.kv_heads // sizes.body_heads, body, None)


def _unpack(
    refs: TileRefs, sizes: TileSizes, tokens: Any, head: jax.Array, buffer: int, valid: tuple[Any, Any] | None
) -> None:
    """Bring a head's keys and values into the form that the products take."""
    dtype = refs.keys.dtype
    keys, values = head_rows.load_kv(tokens, head, sizes.tile_kv, dtype, sizes.native)
    if valid is not None:
        place = lax.broadcasted_iota(jnp.int32, keys.shape, 0)
        seen = (place >= valid[0]) & (place < valid[1])
        keys = jnp.where(seen, keys.astype(jnp.float32), 0).astype(dtype)
        values = jnp.where(seen, values, 0)  # a weight of 0 does not protect from a NaN
    refs.keys[buffer] = keys
    refs.values[buffer, : sizes.head_rows] = values.T[: sizes.head_rows].astype(dtype)


def _steps(sizes: TileSizes) -> range:
    return range(0, sizes.tile_kv, sizes.sub_kv)


def _precision(dtype: Any) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _group_queries(refs: TileRefs, sizes: TileSizes, group: _Group) -> jax.Array:
    """[lanes, H]."""
    shape = group.shape
    if shape.heads == 1:
        head, block = divmod(group.number, shape.blocks)
        queries: jax.Array = refs.queries[group.head * sizes.group + head, pl.ds(block * shape.lanes, shape.lanes)]
        return queries
    first = group.head * sizes.group + group.number * shape.heads
    stacked: jax.Array = refs.queries[pl.ds(first, shape.heads), pl.ds(0, shape.tokens)]
    return stacked.reshape(shape.lanes, -1)


def _score(refs: TileRefs, sizes: TileSizes, group: _Group) -> jax.Array:
    """Put a lane group's scores into its buffer; the highest of each lane, [1, lanes]."""
    queries = _group_queries(refs, sizes, group)
    precision = _precision(queries.dtype)
    highest = None
    for start in _steps(sizes):
        part = pl.ds(start, sizes.sub_kv)
        scores = lax.dot_general(
            refs.keys[group.buffer, part],
            queries,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=precision,
        )
        if sizes.soft_cap is not None:
            scores = jnp.tanh(scores) * sizes.soft_cap
        if group.masked:
            scores += refs.bias[group.number % group.shape.blocks, part, pl.ds(0, group.shape.lanes)]
        refs.scores[group.scores, part, : group.shape.lanes] = scores
        top = scores.reshape(-1, 8, group.shape.lanes).max(0)
        highest = top if highest is None else jnp.maximum(highest, top)
    assert highest is not None
    return highest.max(0, keepdims=True)


def _weigh(refs: TileRefs, sizes: TileSizes, group: _Group, highest: jax.Array) -> None:
    """Turn a lane group's scores into weights and add the values by them."""
    lanes = pl.ds(0, group.shape.lanes)
    row = group.head * sizes.lane_groups(group.shape) + group.number
    before = refs.tops[row, :, lanes]
    top = jnp.maximum(before, highest)
    refs.tops[row, :, lanes] = top
    dtype = refs.values.dtype
    added = None
    for start in _steps(sizes):
        part = pl.ds(start, sizes.sub_kv)
        weights = jnp.exp2(refs.scores[group.scores, part, lanes] - top).astype(dtype)
        product = jnp.dot(
            refs.values[group.buffer, :, part],
            weights,
            preferred_element_type=jnp.float32,
            precision=_precision(dtype),
        )
        added = product if added is None else added + product
    refs.acc[row, :, lanes] = refs.acc[row, :, lanes] * jnp.exp2(before - top) + added


def begin(refs: TileRefs, sizes: TileSizes, shape: TileShape, sinks: Any) -> None:
    """Set the sums of every query to nothing seen, or to its head's sink.

    Args:
        refs: `acc` and `tops` are set.
        sizes: static.
        shape: of the query tile; static.
        sinks: ref [N] f32 in SMEM, scores in base 2 that take weight and have no value; None: none.
    """
    groups = sizes.lane_groups(shape)
    rows = lax.broadcasted_iota(jnp.int32, (sizes.head_rows + sizes.sum_rows, shape.lanes), 0)
    empty = jnp.where(rows >= sizes.head_rows, 0.0 if sinks is None else 1.0, 0.0)
    lane = lax.broadcasted_iota(jnp.int32, (1, shape.lanes), 1)

    def one(row: jax.Array, carry: None) -> None:
        refs.acc[row, :, pl.ds(0, shape.lanes)] = empty
        top = jnp.full((1, shape.lanes), LOWEST, jnp.float32)
        if sinks is not None:
            first = lax.div(row, groups) * sizes.group + lax.div(lax.rem(row, groups) * shape.lanes, shape.tokens)
            for head in range(shape.heads):
                top = jnp.where(lane >= head * shape.tokens, sinks[first + head], top)
        refs.tops[row, :, pl.ds(0, shape.lanes)] = top

    lax.fori_loop(0, sizes.kv_heads * groups, one, None, unroll=math.gcd(sizes.kv_heads * groups, _UNROLL))


def finish(refs: TileRefs, sizes: TileSizes, shape: TileShape, v_scale: jax.Array) -> None:
    """Divide by the sums and put the results, zero where nothing was visible, in place of the queries."""
    groups = sizes.lane_groups(shape)
    width = refs.queries.shape[-1]

    def one(row: jax.Array, carry: None) -> None:
        total = refs.acc[row, pl.ds(sizes.head_rows, 1), pl.ds(0, shape.lanes)]
        factor = jnp.where(total > 0, v_scale / jnp.where(total > 0, total, 1), 0)
        out = (refs.acc[row, pl.ds(0, sizes.head_rows), pl.ds(0, shape.lanes)] * factor).T
        if width > sizes.head_rows:
            out = jnp.concatenate([out, jnp.zeros((shape.lanes, width - sizes.head_rows), out.dtype)], axis=1)
        out = out.astype(refs.queries.dtype)
        head = lax.div(row, groups) * sizes.group
        index = lax.rem(row, groups)
        if shape.heads == 1:
            place = pl.multiple_of(lax.rem(index, shape.blocks) * shape.lanes, shape.lanes)
            refs.queries[head + lax.div(index, shape.blocks), pl.ds(place, shape.lanes)] = out
        else:
            stacked = out.reshape(shape.heads, shape.tokens, width)
            refs.queries[pl.ds(head + index * shape.heads, shape.heads), pl.ds(0, shape.tokens)] = stacked

    lax.fori_loop(0, sizes.kv_heads * groups, one, None, unroll=math.gcd(sizes.kv_heads * groups, _UNROLL))
