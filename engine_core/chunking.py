"""Which prompt tokens to compute next: chunked prefill over a queue of sequences, first come first served.

Used by the prefill worker for every request and by the decode worker for local prefill and resumed sequences.
"""

from __future__ import annotations

import math
from collections import deque

from engine_core.batch import Chunk
from engine_core.sequence import Sequence
from engine_core.sequence_memory import SequenceMemory


class ChunkQueue:
    """Sequences whose known tokens are not all in the cache yet.

    Args:
        memory: where pages and slots come from.

    Attributes:
        starved: the first that waits, if there were no pages for it when its turn last came.
        before: those that came later (`time.monotonic()`) get no pages yet.
    """

    def __init__(self, memory: SequenceMemory) -> None:
        self._memory = memory
        self._waiting: deque[Sequence] = deque()
        self._active: deque[Sequence] = deque()
        self._held: dict[Sequence, int] = {}
        self.starved: Sequence | None = None
        self.before = math.inf

    def __len__(self) -> int:
        return len(self._waiting) + len(self._active)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not been given pages yet."""
        return len(self._waiting)

    @property
    def queued_tokens(self) -> int:
        """Tokens still to be computed, before any look into the cache, without those on their way here. Any thread."""
        left = sum(len(sequence.token_ids) - sequence.num_dispatched for sequence in tuple(self._active))
        return left + sum(map(self._num_missing, tuple(self._waiting)))

    def _num_missing(self, sequence: Sequence) -> int:
        return len(sequence.token_ids) - self._held.get(sequence, 0) * self._memory.page_size

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Queue a sequence; `first` is for one that was preempted."""
        self._memory.touch(sequence)
        if first:
            self._waiting.appendleft(sequence)
        else:
            self._waiting.append(sequence)

    def hold(self, sequence: Sequence, num_blocks: int) -> None:
        """Pass over a sequence that waits, until `resume`: it keeps its place.

        Args:
            num_blocks: leading blocks that are cached or on their way here.
        """
        self._held[sequence] = num_blocks

    def resume(self, sequence: Sequence) -> None:
        """Its turn may come."""
        self._held.pop(sequence, None)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; what it holds stays its own."""
        self._held.pop(sequence, None)
        if self.starved is sequence:
            self.starved = None
        for queue in (self._waiting, self._active):
            if sequence in queue:
                queue.remove(sequence)

    def next_chunks(self, num_tokens: int, num_rows: int, most: int) -> list[Chunk]:
        """Chunks for one step, and advance their sequences past them.

        Args:
            num_tokens: tokens of the step at most, of each row shard.
            num_rows: sequences of the step at most, of each row shard.
            most: tokens of one sequence at most.
        """
        shards = len(self._memory.shards)
        chunks: list[Chunk] = []
        tokens, rows = [num_tokens] * shards, [num_rows] * shards
        coming: set[bytes] = set()  # blocks that this step fills
        at = 0
        self.starved = None
        while any(map(min, tokens, rows)) and (at < len(self._active) or self._admit(num_rows * shards, coming)):
            sequence = self._active[at]
            shard = sequence.shard
            count = min(tokens[shard], most, len(sequence.token_ids) - sequence.num_dispatched)
            if count and rows[shard]:
                chunks.append(self._advance(sequence, count))
                coming.update(self._memory.blocks(sequence, sequence.num_dispatched - count, sequence.num_dispatched))
                tokens[shard] -= count
                rows[shard] -= 1
            if sequence.num_dispatched < len(sequence.token_ids):
                at += 1
            else:
                del self._active[at]
        return chunks

    def _advance(self, sequence: Sequence, count: int) -> Chunk:
        start = sequence.num_dispatched
        sequence.num_dispatched += count
        is_last = sequence.num_dispatched == len(sequence.token_ids)
        sequence.num_sampled += is_last
        return Chunk(sequence, start, count, is_last=is_last)

    def _admit(self, num_rows: int, coming: set[bytes]) -> bool:
        """The first of those that wait and are not held gets its pages and a slot, if there are any.

        As late as possible: what was stored meanwhile is found in the cache, and what this step computes will be.
        """
        if len(self._active) >= num_rows:
            return False
        sequence = next((waiting for waiting in self._waiting if waiting not in self._held), None)
        if sequence is None or sequence.created_at > self.before:
            return False
        if self._memory.first_missing(sequence) in coming:
            return False
        if not self._memory.place(sequence, computes=True):
            self.starved = sequence if self._memory.has_free_slot else None
            return False
        self._waiting.remove(sequence)
        self._active.append(sequence)
        return True
