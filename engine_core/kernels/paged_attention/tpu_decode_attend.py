"""The arithmetic of the decode kernel: scores, weights and sums of a group of items, in straight-line code."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from engine_core.kernels.paged_attention import kv_words, tpu_decode_items
from engine_core.kernels.paged_attention.tpu_decode_state import LANES, MASKED, Refs, Sizes

_LOG2_E = math.log2(math.e)


def fill_constants(refs: Refs, sizes: Sizes) -> None:
    """Fill what is the same for all items."""
    refs.zeros[...] = jnp.zeros(refs.zeros.shape, refs.zeros.dtype)
    refs.token_of[...] = kv_words.tokens_of_rows(sizes.words, refs.token_of.shape)
    head = kv_words.heads_of_rows(sizes.words, refs.bias.shape)
    query_head = lax.broadcasted_iota(jnp.int32, refs.bias.shape, 0)
    refs.bias[...] = jnp.where(lax.div(query_head, sizes.group_heads) == head, 0.0, MASKED)
    for ref in (refs.top, refs.total, refs.acc):
        ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _dot(left: jax.Array, right: jax.Array, transposed: bool) -> jax.Array:
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32, precision=precision)


def _fold(values: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """[N, n * 128] to [N, 128]: combine the groups of lanes."""
    return functools.reduce(combine, [values[:, at : at + LANES] for at in range(0, values.shape[1], LANES)])


def _columns(sizes: Sizes, block: int) -> slice:
    return slice(block * sizes.words.block_rows, (block + 1) * sizes.words.block_rows)


def _load(refs: Refs, sizes: Sizes, slot: jax.Array, place: int, block: int, side: int) -> jax.Array:
    """Keys or values of a block of an item, [block rows, H]."""
    return kv_words.load(refs.kv.at[slot], sizes.words, place * sizes.blocks + block, side, refs.q.dtype, sizes.native)


def _score_block(
    refs: Refs, sizes: Sizes, q: jax.Array, keys: jax.Array, begin: jax.Array, end: jax.Array
) -> jax.Array:
    """[N, block rows] f32 in base 2: scores of the tokens [begin, end) of a block, the others masked."""
    scores = _dot(q, keys, transposed=True)
    if sizes.soft_cap is None:
        scores = scores * (sizes.scale * _LOG2_E * refs.kv_scales[0])
    else:
        scores = jnp.tanh(scores * (sizes.scale / sizes.soft_cap * refs.kv_scales[0])) * (sizes.soft_cap * _LOG2_E)
    token = refs.token_of[0:1, :]
    visible = token < end
    if sizes.windowed:
        visible &= token >= begin
    return jnp.asarray(scores + refs.bias[...] + jnp.where(visible, 0.0, MASKED))


def score_item(refs: Refs, sizes: Sizes, slot: jax.Array, place: int) -> None:
    """Fill `scores` and `highest` of an item from its keys."""
    item = slot * sizes.tiles.group + place
    q = refs.q[refs.item_row[item]]
    begin, end = refs.item_hidden[item], refs.item_left[item]
    highest = []
    for block in range(sizes.blocks):
        keys = _load(refs, sizes, slot, place, block, kv_words.KEY)
        before = block * sizes.words.block_tokens
        scores = _score_block(refs, sizes, q, keys, begin - before, end - before)
        refs.scores[place, :, _columns(sizes, block)] = scores
        highest.append(_fold(scores, jnp.maximum))
    refs.highest[place] = functools.reduce(jnp.maximum, highest)


def weigh_group(refs: Refs, sizes: Sizes, slot: jax.Array) -> list[jax.Array]:
    """Turn `scores` into `weights`; `decays` and the [N, 1] f32 sums of weights at each item's end, of its sequence.

    A sink is a score whose value is zero.
    """
    sinks = refs.sinks[...]
    lane = lax.broadcasted_iota(jnp.int32, sinks.shape, 1)
    sink_total = jnp.where((lane == 0) & (sinks > MASKED), 1.0, 0.0)
    top, total, totals = refs.top[...], refs.total[...], []
    for place in range(sizes.tiles.group):
        first = refs.item_first[slot * sizes.tiles.group + place] > 0
        before = jnp.where(first, sinks, top)
        top = jnp.maximum(before, refs.highest[place].max(axis=1, keepdims=True))
        decay = jnp.exp2(before - top)
        total = jnp.where(first, sink_total, total) * decay
        for block in range(sizes.blocks):
            weights = jnp.exp2(refs.scores[place, :, _columns(sizes, block)] - top[:, :1])
            refs.weights[place, :, _columns(sizes, block)] = weights.astype(refs.weights.dtype)
            total += _fold(weights, jnp.add)
        refs.decays[place] = decay
        totals.append(total.sum(axis=1, keepdims=True))
    refs.top[...] = top
    refs.total[...] = total
    return totals


def mix_item(refs: Refs, sizes: Sizes, slot: jax.Array, place: int, total: jax.Array) -> None:
    """Sum the values of an item by their weights; the result of a sequence that ends goes to its row of `q`."""
    item = slot * sizes.tiles.group + place
    acc = jnp.where(refs.item_first[item] > 0, 0.0, refs.acc[...]) * refs.decays[place][:, :1]
    for block in range(sizes.blocks):
        values = _load(refs, sizes, slot, place, block, kv_words.VALUE)
        acc += _dot(refs.weights[place, :, _columns(sizes, block)], values, transposed=False)
    refs.acc[...] = acc
    target = jnp.where(tpu_decode_items.is_last(refs, sizes, item), refs.item_row[item], sizes.rows)
    refs.q[target] = (acc * (refs.kv_scales[1] / total)).astype(refs.q.dtype)


def attend_last(refs: Refs, sizes: Sizes, slot: jax.Array) -> None:
    """Finish a group whose scores are there."""
    for place, total in enumerate(weigh_group(refs, sizes, slot)):
        mix_item(refs, sizes, slot, place, total)


def attend(refs: Refs, sizes: Sizes, slot: jax.Array, following: jax.Array, between: Callable[[int], Any]) -> None:
    """Finish the group in `slot`, whose scores are there, and score the one in `following`.

    In this order the reduction over lanes and the exponentials hide behind the loading of keys into the MXU, and the
    latency of the scores behind that of values. `between(place)` runs after each item's scores.
    """
    totals = weigh_group(refs, sizes, slot)
    for place in range(sizes.tiles.group):
        score_item(refs, sizes, following, place)
        between(place)
    for place, total in enumerate(totals):
        mix_item(refs, sizes, slot, place, total)
