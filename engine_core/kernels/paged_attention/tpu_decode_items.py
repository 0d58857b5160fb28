"""The walk of the decode kernel over its items: which come next, their copies, and the places at a sequence's ends.

An item is `tile_kv` tokens of one sequence, from a page border on. Items follow each other along a sequence and from
one sequence to the next; a group of them is one iteration's work. Advancing and copying have no branches, so that the
compiler can spread them between vector instructions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine_core.kernels.paged_attention import kv_words
from engine_core.kernels.paged_attention.tpu_decode_state import NEW_ROWS, RESULTS, Refs, Sizes

_CLEARED = 8  # tokens cleared at a time


class Cursor(NamedTuple):
    """The next item to fetch. `place == end`: none is left, and its tokens lie beyond the last sequence's end."""

    place: jax.Array  # [] i32, of its sequence among the sequences
    end: jax.Array  # [] i32, number of sequences
    row: jax.Array  # [] i32
    length: jax.Array  # [] i32, tokens of the sequence, the new one too
    position: jax.Array  # [] i32, of the item's first token
    first: jax.Array  # [] i32, 1 if it is the sequence's first item

    @property
    def live(self) -> jax.Array:
        """[] bool."""
        return self.place < self.end


def list_sequences(refs: Refs, sizes: Sizes) -> jax.Array:
    """Fill `sequences`; their number. The other rows' results are zeros, whose copies start here."""

    def empty(row: jax.Array) -> Any:
        return (row >= refs.num_decode[0]) | (refs.kv_lens[row] <= 0)

    def note(row: jax.Array, count: jax.Array) -> jax.Array:
        refs.sequences[count] = row
        following: jax.Array = count + 1 - empty(row).astype(jnp.int32)
        return following

    def blank(row: jax.Array, carry: None) -> None:
        pl.when(empty(row))(pltpu.make_async_copy(refs.zeros, refs.out.at[row], refs.sems.at[RESULTS]).start)

    refs.sequences[0] = 0
    count: jax.Array = lax.fori_loop(0, sizes.rows, note, jnp.int32(0))
    refs.sequences[count] = refs.sequences[jnp.maximum(count - 1, 0)]
    pl.when(count < sizes.rows)(lambda: lax.fori_loop(0, sizes.rows, blank, None))
    return count


def _first_visible(refs: Refs, sizes: Sizes, length: Any) -> Any:
    if not sizes.windowed:
        return jnp.int32(0)
    window = refs.window[0]
    return jnp.where(window > 0, jnp.maximum(length - window, 0), 0)


def is_last(refs: Refs, sizes: Sizes, item: jax.Array) -> Any:
    """Whether the item is its sequence's last; [] bool, False where there is no such item."""
    left = refs.item_left[item]
    return (left > 0) & (left <= sizes.tiles.tile_kv)


def begin(refs: Refs, sizes: Sizes, place: jax.Array, end: jax.Array) -> Cursor:
    """Cursor at the first item of a sequence, or at the end."""
    row = refs.sequences[place]
    length = refs.kv_lens[row]
    page = lax.div(_first_visible(refs, sizes, length), sizes.page_size)
    position = jnp.where(place < end, page * sizes.page_size, jnp.maximum(length, 1))
    return Cursor(place, end, row, length, position, jnp.int32(1))


def advance(refs: Refs, sizes: Sizes, cursor: Cursor) -> Cursor:
    """The item after this one."""
    position = cursor.position + sizes.tiles.tile_kv
    ended = position >= cursor.length
    other = begin(refs, sizes, jnp.minimum(cursor.place + ended.astype(jnp.int32), cursor.end), cursor.end)
    same = cursor._replace(position=position, first=jnp.int32(0))
    return Cursor(*(jnp.where(ended, there, here) for there, here in zip(other, same, strict=True)))


def fetch(refs: Refs, sizes: Sizes, slot: jax.Array, place: int, cursor: Cursor) -> tuple[jax.Array, jax.Array]:
    """Note an item as the `place`-th of a group and start the copies of its pages.

    Only tokens that exist are copied, without the new one. A page without any is replaced by one token of the item's
    first page, or where there is no item, of the last sequence's last page: a copy of nothing would need a branch. No
    one writes there meanwhile, since a sequence's new token leaves when the group with its last item has arrived.

    Returns:
        Tokens copied; whether the item is an edge, 0 or 1. [] i32 both.
    """
    size, tile = sizes.page_size, sizes.tiles.tile_kv
    item = slot * sizes.tiles.group + place
    left, newest = cursor.length - cursor.position, cursor.length - 1
    table = cursor.row * sizes.pages
    refs.item_row[item] = cursor.row
    refs.item_first[item] = cursor.first
    refs.item_hidden[item] = _first_visible(refs, sizes, cursor.length) - cursor.position
    refs.item_left[item] = left
    refs.item_page[item] = refs.base_page[0] + refs.page_table[table + lax.div(newest, size)]
    refs.item_offset[item] = lax.rem(newest, size)
    cached = jnp.clip(left - 1, 0, tile)
    first = table + lax.div(jnp.minimum(cursor.position, newest), size)
    copied = jnp.int32(0)
    for page in range(tile // size):
        there = page * size < cached
        tokens = jnp.clip(cached - page * size, 1, size)
        source = refs.base_page[0] + refs.page_table[first + jnp.where(there, page, 0)]
        pltpu.make_async_copy(
            refs.cache.at[source, pl.ds(0, tokens)],
            refs.kv.at[slot, pl.ds(place * tile + page * size, tokens)],
            refs.kv_sems.at[slot],
        ).start()
        copied += tokens
    edge = (left > 0) & (left <= tile)
    if sizes.windowed:
        edge |= cursor.first > 0
    return copied, edge.astype(jnp.int32)


class Group(NamedTuple):
    """A group in the making."""

    slot: jax.Array  # [] i32
    copied: jax.Array  # [] i32, tokens
    num_edges: jax.Array  # [] i32


def open_group(slot: jax.Array) -> Group:
    """Nothing in it yet."""
    return Group(slot, jnp.int32(0), jnp.int32(0))


def extend(refs: Refs, sizes: Sizes, group: Group, place: int, cursor: Cursor) -> tuple[Group, Cursor]:
    """Fetch the cursor's item into the group."""
    copied, edge = fetch(refs, sizes, group.slot, place, cursor)
    refs.edges[group.slot * sizes.tiles.group + group.num_edges] = place
    group = Group(group.slot, group.copied + copied, group.num_edges + edge)
    return group, advance(refs, sizes, cursor)


def close_group(refs: Refs, group: Group) -> None:
    """Note the sums."""
    refs.arriving[group.slot] = group.copied
    refs.num_edges[group.slot] = group.num_edges


def fetch_group(refs: Refs, sizes: Sizes, slot: jax.Array, cursor: Cursor) -> Cursor:
    """Fetch a whole group."""
    group = open_group(slot)
    for place in range(sizes.tiles.group):
        group, cursor = extend(refs, sizes, group, place, cursor)
    close_group(refs, group)
    return cursor


def arrive(refs: Refs, slot: jax.Array) -> None:
    """Wait for all copies of a group at once."""
    copied = refs.kv.at[slot, pl.ds(0, refs.arriving[slot])]
    pltpu.make_async_copy(copied, copied, refs.kv_sems.at[slot]).wait()


def _clear(refs: Refs, sizes: Sizes, slot: jax.Array, begin: jax.Array, end: jax.Array) -> None:
    """Zero the tokens [begin, end) of a slot: a weight of zero does not protect from a NaN."""
    token = jnp.zeros(refs.kv.shape[2:], refs.kv.dtype)

    def one(at: jax.Array, _: None) -> None:
        refs.kv[slot, at] = token

    def many(block: jax.Array, _: None) -> None:
        kv_words.clear(refs.kv.at[slot], sizes.words, block * _CLEARED, _CLEARED, sizes.native)

    last = lax.div(end, _CLEARED)
    first = jnp.minimum(lax.div(begin + _CLEARED - 1, _CLEARED), last)
    lax.fori_loop(begin, jnp.minimum(end, jnp.maximum(begin, first * _CLEARED)), one, None)
    lax.fori_loop(first, last, many, None)
    lax.fori_loop(jnp.maximum(begin, last * _CLEARED), end, one, None)


def _complete_item(refs: Refs, sizes: Sizes, slot: jax.Array, place: jax.Array) -> None:
    item = slot * sizes.tiles.group + place
    tile = sizes.tiles.tile_kv
    offset = place * tile

    @pl.when(is_last(refs, sizes, item))
    def _() -> None:
        row, left = refs.item_row[item], refs.item_left[item]
        new = refs.new[row]
        kv_words.store(refs.leaving.at[pl.ds(row, 1)], sizes.words, 0, new, sizes.native)
        target = refs.cache.at[refs.item_page[item], refs.item_offset[item]]
        pltpu.make_async_copy(refs.leaving.at[row], target, refs.sems.at[NEW_ROWS]).start()
        kv_words.store(refs.kv.at[slot], sizes.words, offset + left - 1, new, sizes.native)
        pl.when(left < tile)(lambda: _clear(refs, sizes, slot, offset + left, offset + tile))

    if sizes.windowed:
        hidden = jnp.clip(refs.item_hidden[item], 0, tile)
        pl.when(hidden > 0)(lambda: _clear(refs, sizes, slot, offset, offset + hidden))


def complete(refs: Refs, sizes: Sizes, slot: jax.Array) -> None:
    """Make a group that has arrived fit for use: new tokens in their places, here and in the cache; no leftovers."""
    start = slot * sizes.tiles.group
    lax.fori_loop(
        0, refs.num_edges[slot], lambda edge, _: _complete_item(refs, sizes, slot, refs.edges[start + edge]), None
    )


def send_results(refs: Refs, sizes: Sizes, slot: jax.Array) -> None:
    """Start the copies of the results of sequences that end in a group."""
    start = slot * sizes.tiles.group

    def send(edge: jax.Array, carry: None) -> None:
        item = start + refs.edges[start + edge]
        row = refs.item_row[item]
        copy = pltpu.make_async_copy(refs.q.at[row], refs.out.at[row], refs.sems.at[RESULTS])
        pl.when(is_last(refs, sizes, item))(copy.start)

    lax.fori_loop(0, refs.num_edges[slot], send, None)
