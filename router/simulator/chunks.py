"""Chunked prefill over a queue of prompts, first come first served, as `engine_core.chunking` does it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from router.simulator.job import Attempt
from router.simulator.memory import Memory


@dataclass(slots=True, eq=False)
class Reading:
    """A prompt that is being read on some worker.

    Attributes:
        num_tokens: to have in the cache when it is done.
        num_cached: tokens found there.
        num_done: tokens dispatched.
        num_computed: tokens whose steps have ended.
        num_stored: blocks that the prefix cache knows.
        num_sent: blocks below it have been sent to the target, or were never wanted.
        num_awaited: leading blocks that are here or on their way from a donor, while some are; others go before it.
        resumed: for a preempted sequence, the tokens it has left to generate, and when it had its latest one.
    """

    attempt: Attempt
    num_tokens: int
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_done: int = 0
    num_computed: int = 0
    num_stored: int = 0
    num_sent: int = 0
    num_awaited: int = 0
    resumed: tuple[int, float] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One step's chunks: (reading, first token, tokens), and their sums."""

    chunks: list[tuple[Reading, int, int]]
    num_tokens: int
    num_pairs: int


class Readings:
    """The queue of one worker.

    Args:
        chunk_tokens, max_rows: tokens and prompts of one step at most.

    Attributes:
        starved: the first that waits, if there were no pages for it when its turn last came.
        before: those that came later get no pages yet.
    """

    def __init__(self, memory: Memory, chunk_tokens: int, max_rows: int) -> None:
        self._memory = memory
        self._chunk_tokens = chunk_tokens
        self._max_rows = max_rows
        self._waiting: deque[Reading] = deque()
        self._active: deque[Reading] = deque()
        self.starved: Reading | None = None
        self.before = math.inf

    def __len__(self) -> int:
        return len(self._waiting) + len(self._active)

    @property
    def num_waiting(self) -> int:
        """Prompts without pages."""
        return len(self._waiting)

    @property
    def queued_tokens(self) -> int:
        """Tokens still to be computed, before any look into the cache, without those on their way here."""
        left = sum(reading.num_tokens - reading.num_done for reading in self._active)
        return left + sum(map(self._num_missing, self._waiting))

    def _num_missing(self, reading: Reading) -> int:
        return reading.num_tokens - reading.num_awaited * self._memory.page_size

    def add(self, reading: Reading, *, first: bool) -> None:
        """Queue a prompt; `first` is for one that was preempted."""
        self._memory.cache.touch(reading.attempt.job.hashes)
        if first:
            self._waiting.appendleft(reading)
        else:
            self._waiting.append(reading)

    def remove(self, attempt: Attempt) -> None:
        """Forget a prompt and free its pages. Unknown ones are fine."""
        if self.starved is not None and self.starved.attempt is attempt:
            self.starved = None
        for queue in (self._waiting, self._active):
            for reading in [one for one in queue if one.attempt is attempt]:
                queue.remove(reading)
                self._memory.release(reading.pages)
                reading.pages = []

    def next_step(self) -> Step | None:
        """Chunks for one step, dispatched."""
        chunks: list[tuple[Reading, int, int]] = []
        self.starved = None
        left, num_pairs = self._chunk_tokens, 0
        size = self._memory.page_size
        coming: set[bytes] = set()  # blocks that this step fills
        while left > 0 and len(chunks) < self._max_rows and (self._active or self._admit(coming)):
            reading = self._active[0]
            start = reading.num_done
            count = min(left, reading.num_tokens - start)
            chunks.append((reading, start, count))
            num_pairs += count * start + count * (count + 1) // 2
            left -= count
            reading.num_done += count
            coming.update(reading.attempt.job.hashes[start // size : reading.num_done // size])
            if reading.num_done < reading.num_tokens:
                break
            self._active.popleft()
        for reading, _, _ in chunks:
            reading.num_stored = self._memory.store(
                reading.attempt.job.hashes, reading.pages, reading.num_stored, reading.num_done
            )
        return Step(chunks, self._chunk_tokens - left, num_pairs) if chunks else None

    def _admit(self, coming: set[bytes]) -> bool:
        """The first of those that wait gets pages, if there are any; not before what it shares is cached.

        Those whose blocks are on their way from a donor are passed over.
        """
        reading = next((waiting for waiting in self._waiting if not waiting.num_awaited), None)
        if reading is None or reading.attempt.came_at > self.before:
            return False
        hashes = reading.attempt.job.hashes
        reserved = self._memory.reserve(hashes, reading.num_tokens - 1, reading.num_tokens)
        if reserved is None:
            self.starved = reading
            return False
        pages, num_cached = reserved
        if not coming.isdisjoint(hashes[num_cached : num_cached + 1]):
            self._memory.release(pages)
            return False
        reading.pages = pages
        reading.num_cached = num_cached * self._memory.page_size
        reading.num_done = reading.num_computed = reading.num_cached
        reading.num_stored = num_cached
        self._waiting.remove(reading)
        self._active.append(reading)
        return True
