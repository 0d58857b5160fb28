"""A hash table from index keys to bitmaps, in NumPy arrays, whose operations take whole batches.

Two-choice hashing with buckets of eight: a key lives in one of two buckets that its own bits name (keys are uniformly
random already), in whichever had more room when it came. A lookup is thus two gathers and a comparison, without
probing, up to a load of 0.8 and beyond (Azar, Broder, Karlin, Upfal: Balanced Allocations, SIAM J. Comput. 1999).

The bitmaps are *planes* of 64-bit *words*: bit `c` of word `w` in plane `p` belongs to column `64 w + c`. A plane that
nothing was ever written to costs no memory, and neither does one that was just dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine_core.block_hash import Keys

Slots = npt.NDArray[np.int64]
Masks = npt.NDArray[np.uint64]

BUCKET = 8
MAX_LOAD = 0.8

_BUCKET_SHIFT = BUCKET.bit_length() - 1
_ROW_SHIFT = _BUCKET_SHIFT + 1  # two buckets
_HALF = np.uint64(32)
_ROUNDS = 16  # of an insertion: keys of one batch that want the same place settle it in as many turns


class BlockTable:
    """Fixed in size. Absent keys and keys without bits are the same thing. Key 0 marks a free slot: never pass it.

    Args:
        num_buckets: of `BUCKET` slots each; below 2^32.
        num_planes: of bitmaps.

    Attributes:
        num_used: slots taken, including those that only `scrub` will find empty.
        version: another object whenever `addresses` may have changed.
    """

    def __init__(self, num_buckets: int, num_planes: int) -> None:
        assert 0 < num_buckets < 1 << 32, num_buckets
        self.num_buckets = num_buckets
        self.num_slots = num_buckets * BUCKET
        self._scale = np.uint64(num_buckets)
        self.num_used = 0
        self.num_planes = num_planes
        self.version = object()
        self._num_moves = 0
        self._keys: npt.NDArray[np.uint64] = np.zeros((num_buckets, BUCKET), np.uint64)
        self._flat_keys = self._keys.reshape(-1)
        self._planes: list[dict[int, Masks]] = [{} for _ in range(num_planes)]

    def is_crowded_with(self, num_keys: int) -> bool:
        """Whether so many more keys might not find room."""
        return self.num_used + num_keys > MAX_LOAD * self.num_slots

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        planes = sum(words.nbytes for plane in self._planes for words in plane.values())
        return self._keys.nbytes + planes

    def addresses(self, num_words: int) -> list[int]:
        """Of the keys; how many buckets they have; and of the bits, words by words, of each all planes (0: none)."""
        numbers = [self._keys.ctypes.data, self.num_buckets]
        for word in range(num_words):
            for plane in self._planes:
                words = plane.get(word)
                numbers.append(words.ctypes.data if words is not None else 0)
        return numbers

    def locate(self, keys: Keys) -> Slots:
        """Slot of each key, -1 where it is absent."""
        rows, found = self._hits(keys)
        slots = np.full(len(keys), -1, np.int64)
        slots[rows] = found
        return slots

    def locate_leading(self, keys: Keys) -> Slots:
        """Slots of the keys before the first that is absent."""
        rows, found = self._hits(keys)
        odd = np.flatnonzero(rows != np.arange(len(rows)))
        if not len(odd):
            return found
        if rows[odd[0]] > odd[0]:
            return found[: odd[0]]
        slots = self.locate(keys)  # there is a key whose two buckets are one, so that it is found twice
        absent = np.flatnonzero(slots < 0)
        return slots[: absent[0]] if len(absent) else slots

    def _hits(self, keys: Keys) -> tuple[Slots, Slots]:
        """Which of `keys` are present, in order, and their slots; one twice if its two buckets are the same."""
        buckets = self._buckets(keys).reshape(-1)
        held = self._keys.take(buckets, axis=0).reshape(-1, 2 * BUCKET)
        hits = np.flatnonzero(held == keys[:, None])
        return hits >> _ROW_SHIFT, buckets.take(hits >> _BUCKET_SHIFT) * BUCKET + (hits & (BUCKET - 1))

    def add(self, keys: Keys, plane: int, word: int, masks: Masks) -> Slots:
        """Set the bits `masks[i]` of `keys[i]`; keys may repeat.

        Returns:
            Which of `keys` found no room, so that nothing was stored for them: their indices, none as a rule.
        """
        slots = self._place(keys)
        refused = np.flatnonzero(slots < 0)
        if len(refused):
            placed = slots >= 0
            slots, masks = slots[placed], masks[placed]
        np.bitwise_or.at(self._words(plane, word), slots, masks)
        return refused

    def remove(self, keys: Keys, planes: Sequence[int], word: int, masks: Masks) -> None:
        """Clear the bits `masks[i]` of `keys[i]` in some planes; keys may repeat or be absent."""
        of_planes = [words for plane in planes if (words := self._planes[plane].get(word)) is not None]
        if not of_planes:
            return
        slots = self.locate(keys)
        present = slots >= 0
        slots, kept = slots[present], ~masks[present]
        for words in of_planes:
            np.bitwise_and.at(words, slots, kept)
        self._free(np.unique(slots[self._is_empty(slots)]))

    def gather(self, slots: Slots, word: int, num_planes: int) -> Masks:
        """Bits of the first planes together, of slots that exist: `[n] u64`."""
        bits = np.zeros(len(slots), np.uint64)
        for plane in self._planes[:num_planes]:
            words = plane.get(word)
            if words is not None:
                bits |= words.take(slots)
        return bits

    def drop_plane(self, plane: int) -> None:
        """Clear every bit of a plane, at once."""
        self._planes[plane] = {}
        self.version = object()

    def scrub(self, start: int, count: int, word_masks: Masks) -> int:
        """Clear columns in `count` slots from `start` on, and free the slots that hold nothing.

        Args:
            word_masks: per word, the bits to keep.

        Returns:
            Where to go on; `num_slots` at the end.
        """
        end = min(start + count, self.num_slots)
        for plane in self._planes:
            for word, words in plane.items():
                words[start:end] &= word_masks[word]
        taken = start + np.flatnonzero(self._flat_keys[start:end])
        self._free(taken[self._is_empty(taken)])
        return end

    def move(self, start: int, count: int, target: BlockTable, word_masks: Masks) -> int:
        """Move `count` slots from `start` on to another table, but for the bits that `word_masks` lacks.

        What the other table refuses is lost: it is larger, so next to nothing, and callers live with losses.

        Returns:
            Where to go on; `num_slots` at the end.
        """
        end = min(start + count, self.num_slots)
        slots = start + np.flatnonzero(self._flat_keys[start:end])
        kept = [
            (plane, word, words[slots] & word_masks[word])
            for plane, of_plane in enumerate(self._planes)
            for word, words in of_plane.items()
        ]
        held = np.zeros(len(slots), np.bool_)
        for _, _, bits in kept:
            held |= bits != 0
        places = target._place(self._flat_keys[slots[held]])
        for plane, word, bits in kept:
            target._words(plane, word)[places[places >= 0]] |= bits[held][places >= 0]
            self._planes[plane][word][slots] = 0
        self._free(slots)
        return end

    def _place(self, keys: Keys) -> Slots:
        """The slot of each key, which it gets if it has none yet; -1 where there is no room. Keys may repeat."""
        slots = self.locate(keys)
        absent = slots < 0
        if absent.any():
            wanted = keys[absent]
            distinct = np.sort(wanted)
            distinct = distinct[np.concatenate(([True], distinct[1:] != distinct[:-1]))]
            num_moves = self._num_moves
            slots[absent] = self._insert(distinct)[np.searchsorted(distinct, wanted)]
            if self._num_moves != num_moves:  # perhaps of one of these
                slots = self.locate(keys)
        return slots

    def _insert(self, keys: Keys) -> Slots:
        """A slot for each of some distinct absent keys, -1 where there is no room."""
        slots = np.full(len(keys), -1, np.int64)
        waiting = np.arange(len(keys))
        for _ in range(_ROUNDS):
            wanted = keys[waiting]
            buckets = self._buckets(wanted)
            free = self._keys.take(buckets.reshape(-1), axis=0) == 0
            room = free.sum(axis=1).reshape(-1, 2)
            second = room[:, 1] > room[:, 0]
            chosen = np.where(second, buckets[:, 1], buckets[:, 0])
            first_free = free.argmax(axis=1).reshape(-1, 2)
            places = chosen * BUCKET + np.where(second, first_free[:, 1], first_free[:, 0])
            full = waiting[room.max(axis=1) == 0]
            if len(full):
                fits = room.max(axis=1) > 0
                waiting, wanted, places = waiting[fits], wanted[fits], places[fits]
            self._flat_keys[places] = wanted
            won = self._flat_keys[places] == wanted  # of those that want one place, the last to write has it
            slots[waiting[won]] = places[won]
            self.num_used += int(np.count_nonzero(won))
            waiting = waiting[~won]
            for row in full:
                slots[row] = self._insert_by_moving(keys[row])
            if not len(waiting):
                break
        return slots

    def _insert_by_moving(self, key: np.uint64) -> int:
        """Both buckets are full: let one of their keys go to its other bucket. About one key in a million needs it."""
        for bucket in self._buckets(np.array([key]))[0]:
            others = self._buckets(self._keys[bucket])
            others = np.where(others[:, 0] == bucket, others[:, 1], others[:, 0])
            open_rows = np.flatnonzero((self._keys[others] == 0).any(axis=1))
            if len(open_rows):
                row = open_rows[0]
                source = int(bucket * BUCKET + row)
                target = int(others[row] * BUCKET + (self._keys[others[row]] == 0).argmax())
                self._flat_keys[target] = self._flat_keys[source]
                for plane in self._planes:
                    for words in plane.values():
                        words[target], words[source] = words[source], 0
                self._flat_keys[source] = key
                self.num_used += 1
                self._num_moves += 1
                return source
        return -1

    def _free(self, slots: Slots) -> None:
        self.num_used -= len(slots)
        self._flat_keys[slots] = 0

    def _is_empty(self, slots: Slots) -> npt.NDArray[np.bool_]:
        empty = np.ones(len(slots), np.bool_)
        for plane in self._planes:
            for words in plane.values():
                empty &= words.take(slots) == 0
        return empty

    def _words(self, plane: int, word: int) -> Masks:
        words = self._planes[plane].get(word)
        if words is None:
            words = self._planes[plane][word] = np.zeros(self.num_slots, np.uint64)
            self.version = object()
        return words

    def _buckets(self, keys: Keys) -> Slots:
        """`[n, 2]`: the two halves of each key, scaled to the number of buckets."""
        halves = np.ascontiguousarray(keys, "<u8").view("<u4").reshape(-1, 2)
        return ((halves * self._scale) >> _HALF).view(np.int64)
