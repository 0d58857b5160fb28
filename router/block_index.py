"""Which worker holds which blocks, as far as this gateway knows: the global radix index.

Block hashes are chained, so a flat map from block to workers answers what a tree would: the longest prefix that a
worker holds is the run of leading blocks that have its bit. Everything here is advice for placement: what is stale,
missing or lost to a collision costs time, never an answer.

Each worker has a *column* of bits in the table. Its events go there; a snapshot is built in a second, hidden column
that takes the first one's place when it is complete. Columns that are given up are masked out at once and wiped a slice
at a time.

On one thread; time is an argument. Lookups are compiled where there is a compiler (`compiled/matching.cc`); what is
here in NumPy says what they find.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine_core.block_hash import Keys
from engine_core.types import Tier
from router.block_table import BlockTable, Masks
from router.compiled.library import Compiled
from router.compiled.matching import CompiledMatch

Worker = Hashable

PREDICTION_S = 5.0  # a prediction is believed for at least this long, and at most twice as long

_RECENT = len(Tier)  # planes: one per tier, then two for predictions, which take turns
_NUM_PLANES = _RECENT + 2
_PREDICTED = (_RECENT, _RECENT + 1)
_GROWTH = 2.0
_FOLD_KEYS = 16384  # changes that may wait for the next match
_MATCH_BLOCKS = 1024  # looked up at a time: most prompts diverge early
_SLICE_SLOTS = 65536  # wiped or moved per tick
_WORD = 64


@dataclass(slots=True)
class _Changes:
    """What waits to be folded into one (plane, word): arrays of keys, and the bits that each array is about."""

    keys: list[Keys] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)

    def add(self, keys: Keys, bits: int) -> None:
        self.keys.append(keys)
        self.bits.append(bits)

    def concatenated(self) -> tuple[Keys, Masks]:
        lengths = [len(keys) for keys in self.keys]
        return np.concatenate(self.keys), np.repeat(np.array(self.bits, np.uint64), lengths)


@dataclass(slots=True)
class _Phase:
    """Changes whose order does not matter: at most one message of each worker, in which no block is named twice."""

    removed: dict[tuple[int, int], _Changes] = field(default_factory=dict)
    stored: dict[tuple[int, int], _Changes] = field(default_factory=dict)

    def remove(self, plane: int, word: int, keys: Keys, bits: int) -> None:
        self.removed.setdefault((plane, word), _Changes()).add(keys, bits)

    def store(self, plane: int, word: int, keys: Keys, bits: int) -> None:
        self.stored.setdefault((plane, word), _Changes()).add(keys, bits)


@dataclass(slots=True, frozen=True)
class _Known:
    """Columns of workers, without hidden ones: a mask for each word that has any, and whose they are."""

    masks: dict[int, int]
    worker_of: dict[int, Worker]


class BlockIndex:
    """Blocks of all workers.

    Args:
        num_blocks: to begin with; it doubles whenever it is full.
        compiled: looks chains up; None: NumPy does.
    """

    def __init__(self, num_blocks: int, compiled: Compiled | None) -> None:
        self._compiled = CompiledMatch(compiled) if compiled is not None else None
        self._table = BlockTable(_buckets_for(num_blocks), _NUM_PLANES)
        self._old: BlockTable | None = None  # being moved into the larger table
        self._cursor = 0  # of the move, or of the wiping
        self._columns: dict[Worker, int] = {}
        self._known: _Known | None = None  # None: the columns have changed
        self._hidden: dict[Worker, int] = {}
        self._free_columns: list[int] = []
        self._num_columns = 0
        self._dirty = 0  # bits of columns that were given up
        self._wiping = 0  # those of them that the present round over the table wipes
        self._phases: list[_Phase] = []
        self._phase_of: dict[int, int] = {}
        self._num_waiting = 0
        self._recent = 0
        self._rotate_at: float | None = None

    def __len__(self) -> int:
        """Blocks known, to within those that are being moved or wiped."""
        self.fold()
        return self._table.num_used + (self._old.num_used if self._old is not None else 0)

    @property
    def num_bytes(self) -> int:
        """Of the tables."""
        return self._table.num_bytes + (self._old.num_bytes if self._old is not None else 0)

    @property
    def is_moving(self) -> bool:
        """Whether blocks are on their way to a larger table."""
        return self._old is not None

    def join(self, worker: Worker) -> None:
        """A worker that holds nothing as far as we know."""
        assert worker not in self._columns, worker
        self._columns[worker] = self._new_column()
        self._known = None

    def leave(self, worker: Worker) -> None:
        """Forget a worker. Unknown ones are fine."""
        self.drop_snapshot(worker)
        column = self._columns.pop(worker, None)
        if column is not None:
            self._give_up(column)
            self._known = None

    def clear(self, worker: Worker) -> None:
        """It holds nothing any more."""
        self._give_up(self._columns[worker])
        self._columns[worker] = self._new_column()
        self._known = None

    def change(self, worker: Worker, tier: Tier, removed: Keys, stored: Keys) -> None:
        """Blocks left and entered a tier of a worker; no block is in both arrays."""
        self._queue(self._columns[worker], tier, removed, stored)

    def begin_snapshot(self, worker: Worker) -> None:
        """What follows through `fill_snapshot` will replace what is known; until then that stands."""
        self.drop_snapshot(worker)
        self._hidden[worker] = self._new_column()

    def fill_snapshot(self, worker: Worker, tier: Tier, stored: Keys) -> None:
        """A part of the snapshot."""
        self._queue(self._hidden[worker], tier, _NO_KEYS, stored)

    def commit_snapshot(self, worker: Worker) -> None:
        """The snapshot is complete."""
        self._give_up(self._columns[worker])
        self._columns[worker] = self._hidden.pop(worker)
        self._known = None

    def drop_snapshot(self, worker: Worker) -> None:
        """The snapshot will not be completed."""
        column = self._hidden.pop(worker, None)
        if column is not None:
            self._give_up(column)

    def predict(self, worker: Worker, keys: Keys) -> None:
        """A worker is about to hold these blocks.

        Believed for `PREDICTION_S`, by when it will have said so itself, or until it says that one has left.
        """
        column = self._columns.get(worker)
        if column is None or not len(keys):
            return
        if not self._phases:
            self._phases.append(_Phase())
        self._phases[0].store(_RECENT + self._recent, column // _WORD, keys, 1 << (column % _WORD))
        self._num_waiting += len(keys)

    def match(self, keys: Keys) -> dict[Worker, int]:
        """Leading blocks of a chain that each worker holds, in whatever tier or by prediction; only those with any.

        Args:
            keys: `[num_blocks] u64` of the chain from its first block on.
        """
        known = self._look()
        if self._compiled is not None:
            found = self._compiled.depths(keys, self._tables(), known.masks)
            return {known.worker_of[column]: depth for column, depth, _ in found}
        return self._depths(keys, known, _NUM_PLANES)

    def match_both(self, keys: Keys) -> tuple[dict[Worker, int], dict[Worker, int]]:
        """As `match`; and the same without predictions: what workers have said of themselves."""
        known = self._look()
        if self._compiled is not None:
            found = self._compiled.depths(keys, self._tables(), known.masks)
            worker_of = known.worker_of
            return (
                {worker_of[column]: depth for column, depth, _ in found},
                {worker_of[column]: told for column, _, told in found if told},
            )
        held = self._depths(keys, known, _NUM_PLANES)
        return held, self._depths(keys, known, len(Tier)) if held else {}

    def _look(self) -> _Known:
        """Fold what waits before a lookup."""
        self.fold()
        if self._known is None:
            self._known = _Known(self._bits_of(self._columns.values()), {c: w for w, c in self._columns.items()})
        return self._known

    def _depths(self, keys: Keys, known: _Known, num_planes: int) -> dict[Worker, int]:
        """By what the first planes say."""
        alive = known.masks
        depth_of: dict[int, int] = {}
        for start in range(0, len(keys), _MATCH_BLOCKS):
            words = self._gather(keys[start : start + _MATCH_BLOCKS], alive, num_planes)
            alive = {
                word: left
                for word, bits in words.items()
                if (left := _descend(bits, alive[word], start, depth_of, word))
            }
            if not alive:
                break
        return {known.worker_of[column]: depth for column, depth in depth_of.items()}

    def tick(self, now: float) -> None:
        """Call a few times a second: forgets old predictions, and carries the upkeep on by a slice."""
        self.fold()
        if self._rotate_at is None:
            self._rotate_at = now + PREDICTION_S
        elif now >= self._rotate_at:
            self._rotate_at = now + PREDICTION_S
            self._recent ^= 1
            for table in self._tables():
                table.drop_plane(_RECENT + self._recent)
        if self._old is not None:
            self._move(_SLICE_SLOTS)
        else:
            self._wipe()

    # columns

    def _new_column(self) -> int:
        if self._free_columns:
            return self._free_columns.pop()
        self._num_columns += 1
        return self._num_columns - 1

    def _give_up(self, column: int) -> None:
        self.fold()
        self._dirty |= 1 << column

    def _bits_of(self, columns: Iterable[int]) -> dict[int, int]:
        """Word -> its mask."""
        masks: dict[int, int] = {}
        for column in columns:
            masks[column // _WORD] = masks.get(column // _WORD, 0) | 1 << (column % _WORD)
        return masks

    @property
    def _num_words(self) -> int:
        return -(-self._num_columns // _WORD)

    def _kept(self, dropped: int) -> Masks:
        """Per word, all bits but those of some columns."""
        kept = ~dropped & ((1 << (_WORD * max(self._num_words, 1))) - 1)
        return np.frombuffer(kept.to_bytes(8 * max(self._num_words, 1), "little"), "<u8")

    # changes

    def _queue(self, column: int, plane: int, removed: Keys, stored: Keys) -> None:
        number = self._phase_of.get(column, 0)
        self._phase_of[column] = number + 1
        if number == len(self._phases):
            self._phases.append(_Phase())
        phase = self._phases[number]
        word, bit = column // _WORD, 1 << (column % _WORD)
        if len(removed):
            phase.remove(plane, word, removed, bit)
        if len(stored):
            phase.store(plane, word, stored, bit)
        self._num_waiting += len(removed) + len(stored)
        if self._num_waiting >= _FOLD_KEYS:
            self.fold()

    def fold(self) -> None:
        """Apply what waits: many small messages cost little more than one. Lookups do so, too."""
        if not self._num_waiting:
            return
        phases, self._phases = self._phases, []
        self._phase_of.clear()
        self._num_waiting = 0
        for phase in phases:
            for (plane, word), changes in phase.removed.items():
                keys, masks = changes.concatenated()
                for table in self._tables():
                    table.remove(np.maximum(keys, 1), (plane, *_PREDICTED), word, masks)
            for (plane, word), changes in phase.stored.items():
                keys, masks = changes.concatenated()
                self._store(np.maximum(keys, 1), plane, word, masks)

    def _store(self, keys: Keys, plane: int, word: int, masks: Masks) -> None:
        for start in range(0, len(keys), _FOLD_KEYS):  # so that a table fills up between two looks at how full it is
            part, part_masks = keys[start : start + _FOLD_KEYS], masks[start : start + _FOLD_KEYS]
            self._make_room(len(part))
            refused = self._table.add(part, plane, word, part_masks)
            if len(refused) and self._table.is_crowded_with(self._table.num_slots // 4):
                self._grow()
                self._table.add(part[refused], plane, word, part_masks[refused])

    def _make_room(self, num_keys: int) -> None:
        if self._old is not None:
            self._move(2 * num_keys + 256)
        while self._table.is_crowded_with(num_keys):
            self._grow()

    def _grow(self) -> None:
        while self._old is not None:
            self._move(_SLICE_SLOTS)
        self._old = self._table
        self._table = BlockTable(int(self._old.num_buckets * _GROWTH) + 1, _NUM_PLANES)
        self._cursor = 0
        self._wiping = 0

    def _move(self, num_slots: int) -> None:
        assert self._old is not None
        self._cursor = self._old.move(self._cursor, num_slots, self._table, self._kept(self._dirty))
        if self._cursor == self._old.num_slots:
            self._old = None
            self._cursor = 0

    def _wipe(self) -> None:
        """Carry the round over the table on; a column is free again after a round that began behind its end."""
        if self._cursor == 0:
            self._wiping = self._dirty
        self._cursor = self._table.scrub(self._cursor, _SLICE_SLOTS, self._kept(self._wiping))
        if self._cursor == self._table.num_slots:
            self._cursor = 0
            self._free_columns += [column for column in range(self._num_columns) if self._wiping >> column & 1]
            self._dirty &= ~self._wiping
            self._wiping = 0

    # lookup

    def _tables(self) -> list[BlockTable]:
        return [self._table] if self._old is None else [self._table, self._old]

    def _gather(self, keys: Keys, words: Iterable[int], num_planes: int) -> dict[int, Masks]:
        """Per word, the bits of each block up to the first that nobody has."""
        keys = np.maximum(keys, 1)
        if self._old is None:
            slots = self._table.locate_leading(keys)
            return {word: self._table.gather(slots, word, num_planes) for word in words}
        gathered = {word: np.zeros(len(keys), np.uint64) for word in words}
        for table in self._tables():
            slots = table.locate(keys)
            present = slots >= 0
            for word, bits in gathered.items():
                bits[present] |= table.gather(slots[present], word, num_planes)
        return gathered


def _descend(bits: Masks, alive: int, start: int, depth_of: dict[int, int], word: int) -> int:
    """Follow a chain down by some blocks.

    Args:
        bits: of each of these blocks; the chain ends behind the last of them if that is earlier than asked for.
        alive: columns that have every block before `start`.
        depth_of: column -> blocks; set for those of `alive` that have any.

    Returns:
        The columns that have these blocks, too.
    """
    if not len(bits):
        _set_depth(alive, start, depth_of, word)
        return 0
    bits[0] &= np.uint64(alive)
    held = np.bitwise_and.accumulate(bits)
    _set_depth(alive & ~int(held[0]), start, depth_of, word)
    for at in np.flatnonzero(held[1:] != held[:-1]).tolist():
        _set_depth(int(held[at]) & ~int(held[at + 1]), start + at + 1, depth_of, word)
    last = int(held[-1])
    _set_depth(last, start + len(bits), depth_of, word)
    return last if len(bits) == _MATCH_BLOCKS else 0


def _set_depth(columns: int, depth: int, depth_of: dict[int, int], word: int) -> None:
    if not depth:  # they hold nothing
        return
    while columns:
        lowest = columns & -columns
        depth_of[word * _WORD + lowest.bit_length() - 1] = depth
        columns ^= lowest


def _buckets_for(num_blocks: int) -> int:
    return max(16, int(num_blocks / 5.6))


_NO_KEYS: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
