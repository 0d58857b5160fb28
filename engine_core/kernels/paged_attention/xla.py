"""Paged attention in plain XLA, for CPU and GPU.

Online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) in float32 over KV blocks of a fixed
number of tokens, block 0 starting at position 0, with dynamic trip counts: the cost follows the lengths in the cache,
not the page table's. A fully masked block changes no bit of the carry, so it does not matter how many of them run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from engine_core.kv_cache import from_storage

_SLICE = 16  # KV tokens per step of decode on a CPU, within one page
_DECODE_BLOCK = 64  # KV tokens per step of decode elsewhere
_PREFILL_BLOCK = 128  # KV tokens per step of prefill; with the tile, it keeps the scores in a CPU's L2 cache
_PREFILL_TILE = 128  # query rows of one prefill work item
_MASKED = -1e30
_LOWEST = -1e29
_FAR = 2**31 - 1


class _Softmax(NamedTuple):
    """Carry of the online softmax over any leading query dims [...]."""

    top: jax.Array  # [...] f32, highest score so far
    total: jax.Array  # [...] f32, sum of exp(score - top)
    out: jax.Array  # [..., H] f32, sum of exp(score - top) * v

    @classmethod
    def empty(cls, shape: tuple[int, ...], head_dim: int) -> _Softmax:
        """Nothing seen. `top` starts far above a masked score, whose weight is therefore 0 and not exp(0)."""
        return cls(jnp.full(shape, _LOWEST), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))

    def weigh(self, scores: jax.Array, visible: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, _Softmax]:
        """Weights of a block's places (on `axis`); the decay of `out`; the carry without the block's values."""
        scores = jnp.where(visible, scores, _MASKED)
        top = jnp.maximum(self.top, scores.max(axis))
        decay = jnp.exp(self.top - top)
        weights = jnp.exp(scores - jnp.expand_dims(top, axis))
        return weights, decay, _Softmax(top, self.total * decay + weights.sum(axis), self.out)

    def result(self) -> jax.Array:
        """`[..., H]` f32; zeros where nothing was visible."""
        return self.out / jnp.where(self.total > 0, self.total, 1)[..., None]


class _Sizes(NamedTuple):
    """Static sizes of one call."""

    num_kv_heads: int  # K
    group: int  # query heads per KV head
    head_dim: int  # H
    page_size: int
    block_pages: int

    @classmethod
    def of(cls, q: jax.Array, layer_cache: jax.Array, block: int) -> _Sizes:
        page_size, num_kv_heads = layer_cache.shape[1], layer_cache.shape[2] * layer_cache.shape[3] // 2
        return cls(num_kv_heads, q.shape[1] // num_kv_heads, q.shape[2], page_size, max(1, block // page_size))

    @property
    def block(self) -> int:
        return self.block_pages * self.page_size

    def pad(self, page_table: jax.Array) -> jax.Array:
        """Widen a table to whole blocks."""
        return jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % self.block_pages)))

    def read(
        self, layer_cache: jax.Array, page_table: jax.Array, index: jax.Array, narrowest: jax.typing.DTypeLike
    ) -> tuple[jax.Array, jax.Array]:
        """Block `index` of rows [..., P] of a padded table: k, v [..., block, K, H] in the logical dtype.

        float8 comes in the `narrowest` dtype to multiply in, which holds each of its values.
        """
        pages = lax.dynamic_slice_in_dim(page_table, index * self.block_pages, self.block_pages, axis=-1)
        gathered = layer_cache.at[pages].get(mode="clip", wrap_negative_indices=False)
        shape = (*page_table.shape[:-1], self.block, self.num_kv_heads, 2, layer_cache.shape[-1])
        heads = from_storage(gathered.reshape(shape))[..., : self.head_dim]
        if heads.dtype.itemsize == 1:
            heads = heads.astype(narrowest)
        return heads[..., 0, :], heads[..., 1, :]


def decode(
    q: jax.Array,
    layer_cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    window: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attend with one query token per sequence; see `api.ragged_paged_attention`.

    On a CPU the rows run one after the other, each for its own number of blocks; elsewhere all at once, for the
    longest row's. Either way a row's own operations are the same whatever its neighbours do.
    """
    sizes = _Sizes.of(q, layer_cache, _DECODE_BLOCK)

    def one_by_one(q: jax.Array, cache: jax.Array, lens: jax.Array, table: jax.Array, window: jax.Array) -> jax.Array:
        def row(index: jax.Array, out: jax.Array) -> jax.Array:
            attended = _decode_row(sizes, q[index], cache, lens[index], table[index], window, scale)
            return out.at[index].set(attended.astype(q.dtype))

        used = jnp.max(jnp.where(lens > 0, jnp.arange(1, 1 + lens.size), 0))  # data, so never unrolled for B == 1
        out: jax.Array = lax.fori_loop(0, used, row, jnp.zeros_like(q))
        return out

    def together(q: jax.Array, cache: jax.Array, lens: jax.Array, table: jax.Array, window: jax.Array) -> jax.Array:
        return _decode_rows(sizes, q, cache, lens, table, window, scale)

    args = (q, layer_cache, kv_lens, sizes.pad(page_table), window)
    out: jax.Array = lax.platform_dependent(*args, cpu=one_by_one, default=together)
    return out


def _decode_row(
    sizes: _Sizes,
    query: jax.Array,
    layer_cache: jax.Array,
    kv_len: jax.Array,
    pages: jax.Array,
    window: jax.Array,
    scale: float,
) -> jax.Array:
    """One row on a CPU: query [N, H], kv_len [], pages [P] -> [N, H] f32.

    A slice of a few tokens within one page is read in place by the operations that use it, where a gather would copy it
    element by element. The values are added up term by term, which XLA:CPU vectorizes; a reduction it does not.
    """
    grouped = query.astype(jnp.float32).reshape(sizes.num_kv_heads, sizes.group, sizes.head_dim) * scale
    start = jnp.where(window > 0, jnp.maximum(kv_len - window, 0), 0)
    block = math.gcd(sizes.page_size, _SLICE)

    def step(index: jax.Array, carry: _Softmax) -> _Softmax:
        at = (pages[index * block // sizes.page_size], index * block % sizes.page_size, 0, 0, 0)
        stored = lax.dynamic_slice(layer_cache, at, (1, block, *layer_cache.shape[2:]))
        heads = from_storage(stored.reshape(block, sizes.num_kv_heads, 2, -1))[..., : sizes.head_dim]
        heads = heads.astype(jnp.float32)
        places = index * block + jnp.arange(block)
        visible = ((places >= start) & (places < kv_len))[:, None, None]
        scores = lax.dot_general(heads[:, :, 0], grouped, (((2,), (2,)), ((1,), (0,)))).swapaxes(0, 1)  # [C, K, G]
        weights, decay, carry = carry.weigh(scores, visible, axis=0)
        values = jnp.where(visible, heads[:, :, 1], 0)
        seen = _tree_sum([weights[place, :, :, None] * values[place, :, None] for place in range(block)])
        return carry._replace(out=carry.out * decay[..., None] + seen)

    empty = _Softmax.empty((sizes.num_kv_heads, sizes.group), sizes.head_dim)
    carry = lax.fori_loop(start // block, (kv_len + block - 1) // block, step, empty)
    out: jax.Array = carry.result().reshape(query.shape)
    return out


def _tree_sum(terms: list[jax.Array]) -> jax.Array:
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) & ~1 :]
    return terms[0]


def _decode_rows(
    sizes: _Sizes,
    q: jax.Array,
    layer_cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    window: jax.Array,
    scale: float,
) -> jax.Array:
    """All rows at once, in operations that suit an accelerator: q [B, N, H] -> [B, N, H]."""
    grouped = q.reshape(-1, sizes.num_kv_heads, sizes.group, sizes.head_dim)
    start = jnp.where(window > 0, jnp.maximum(kv_lens - window, 0), 0)

    def step(index: jax.Array, carry: _Softmax) -> _Softmax:
        k, v = sizes.read(layer_cache, page_table, index, q.dtype)
        places = index * sizes.block + jnp.arange(sizes.block)
        visible = (places >= start[:, None]) & (places < kv_lens[:, None])  # [B, C]
        scores = _dot("bkgh,bckh->bkgc", grouped.astype(k.dtype), k) * scale
        weights, decay, carry = carry.weigh(scores, visible[:, None, None], axis=-1)
        values = jnp.where(visible[:, :, None, None], v, 0)
        out = carry.out * decay[..., None] + _dot("bkgc,bckh->bkgh", weights.astype(v.dtype), values)
        return carry._replace(out=out)

    empty = _Softmax.empty(grouped.shape[:-1], sizes.head_dim)
    first = jnp.min(jnp.where(kv_lens > 0, start, _FAR)) // sizes.block
    carry = lax.fori_loop(first, (jnp.max(kv_lens) + sizes.block - 1) // sizes.block, step, empty)
    out: jax.Array = carry.result().reshape(q.shape)
    return out.astype(q.dtype)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Products of the cache's dtype, exact for bfloat16 and full float32, summed in float32."""
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def prefill(
    q: jax.Array,
    layer_cache: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    window: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attend with packed rows of several sequences; see `api.ragged_paged_attention`.

    Work items are (sequence row, tile of query rows), run in order. A tile that reaches past its sequence's end writes
    zeros over the next sequence's first rows, which that sequence's own tiles then write.
    """
    num_rows = q.shape[0]
    sizes = _Sizes.of(q, layer_cache, _PREFILL_BLOCK)
    page_table = sizes.pad(page_table)
    tile = min(_PREFILL_TILE, num_rows)
    padded = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    tiles = (q_lens + tile - 1) // tile
    tiles_end = jnp.cumsum(tiles)  # [B], work items up to and including each row's

    def item(index: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(tiles_end, index, side="right", method="compare_all")
        ahead = (index - tiles_end[row] + tiles[row]) * tile  # query rows in earlier tiles of this sequence
        begin = cu_q_lens[row] + ahead
        places = kv_lens[row] - q_lens[row] + ahead + jnp.arange(tile)
        places = jnp.where(places < kv_lens[row], places, -1)
        queries = lax.dynamic_slice_in_dim(padded, begin, tile)
        attended = _attend_tile(sizes, queries, places, layer_cache, page_table[row], window, scale)
        return lax.dynamic_update_slice_in_dim(out, attended, begin, axis=0)

    out: jax.Array = lax.fori_loop(0, tiles_end[-1], item, jnp.zeros_like(padded))
    return out[:num_rows]


def _attend_tile(
    sizes: _Sizes,
    q: jax.Array,
    places: jax.Array,
    layer_cache: jax.Array,
    pages: jax.Array,
    window: jax.Array,
    scale: float,
) -> jax.Array:
    """One tile of a sequence: q [tile, N, H] at places [tile] (-1: padding), pages [P] -> [tile, N, H]."""
    tile = q.shape[0]
    queries = q.reshape(tile, sizes.num_kv_heads, sizes.group, sizes.head_dim)
    queries = queries.transpose(1, 2, 0, 3).reshape(sizes.num_kv_heads, sizes.group * tile, sizes.head_dim)
    starts = jnp.where(window > 0, jnp.maximum(places - window + 1, 0), 0)
    lowest, last = jnp.min(jnp.where(places >= 0, starts, _FAR)), jnp.max(places)

    def step(index: jax.Array, carry: _Softmax) -> _Softmax:
        k, v = sizes.read(layer_cache, pages, index, q.dtype)
        keys = index * sizes.block + jnp.arange(sizes.block)
        visible = jnp.tile((keys <= places[:, None]) & (keys >= starts[:, None]), (sizes.group, 1))
        scores = _dot("kqh,ckh->kqc", queries.astype(k.dtype), k) * scale
        weights, decay, carry = carry.weigh(scores, visible, axis=-1)
        values = jnp.where(((keys >= lowest) & (keys <= last))[:, None, None], v, 0)
        out = carry.out * decay[..., None] + _dot("kqc,ckh->kqh", weights.astype(v.dtype), values)
        return carry._replace(out=out)

    empty = _Softmax.empty(queries.shape[:-1], sizes.head_dim)
    carry = lax.fori_loop(lowest // sizes.block, last // sizes.block + 1, step, empty)
    out: jax.Array = carry.result().reshape(sizes.num_kv_heads, sizes.group, tile, sizes.head_dim)
    return out.transpose(2, 0, 1, 3).reshape(q.shape).astype(q.dtype)
