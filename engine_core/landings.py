"""Sequences whose KV comes from elsewhere, until it is in their pages. Host module, on the engine thread.

Life of a landing here:
    begin -> blocks arrive, verified, and wait -> written between steps -> ended, behind its last blocks
An end that never comes, or one with blocks lost, leaves the leading blocks that are here to the prefix cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engine_core.messages import TokenChunk
from engine_core.sequence import Sequence as Seq
from engine_core.sequence_memory import SequenceMemory

Key = tuple[str, int]
LAND_PAGES = 16  # written between two steps while sequences are running, so that their inter-token latency holds


class PageWriter(Protocol):
    """The engine (that module imports jax, this one never does)."""

    def scatter(self, pages: Sequence[int], layers: Sequence[np.ndarray]) -> None:
        """Queue the write of whole pages; per layer `[n, page_size, 2K, H]`."""


@dataclass(slots=True, eq=False)
class Landing:
    """A sequence that has its pages.

    Attributes:
        num_cached: leading blocks that were here before.
        written: indices of those that have landed.
    """

    sequence: Seq
    num_cached: int
    written: set[int] = field(default_factory=set)

    def holds(self, index: int) -> bool:
        """Whether the block is in its page, or will be once what was dispatched so far has run."""
        return index < self.num_cached or index in self.written


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks that have arrived and wait to be written."""

    key: Key
    indices: list[int]
    layers: list[np.ndarray]
    generations: list[int]


@dataclass(frozen=True, slots=True)
class Landed:
    """Behind the last blocks of a sequence. `lost`: whether some will not come."""

    key: Key
    first_token: TokenChunk
    lost: bool


class Landings:
    """All that are open.

    Args:
        memory: where the pages are.
        writer: writes them.
    """

    def __init__(self, memory: SequenceMemory, writer: PageWriter) -> None:
        self._memory = memory
        self._writer = writer
        self._open: dict[Key, Landing] = {}
        self._arrived: deque[_Blocks | Landed] = deque()

    @property
    def is_behind(self) -> bool:
        """Whether something has arrived that `write` has not seen."""
        return bool(self._arrived)

    @property
    def num_pages(self) -> int:
        """Held by the sequences."""
        return sum(len(landing.sequence.pages) for landing in self._open.values())

    def get(self, key: Key) -> Landing | None:
        """The landing of that sequence, if it is open."""
        return self._open.get(key)

    def begin(self, sequence: Seq) -> list[tuple[int, int]]:
        """The sequence has been given its pages; (block index, page generation) of the blocks it lacks."""
        first = sequence.num_cached // self._memory.page_size
        self._open[sequence.key] = Landing(sequence, first)
        return [(i, self._memory.generation(sequence.pages[i])) for i in range(first, len(sequence.pages))]

    def arrive(
        self, key: Key, indices: Sequence[int], layers: Sequence[np.ndarray], generations: Sequence[int]
    ) -> None:
        """Verified blocks arrived: they are written between the next steps, a few at a time."""
        for at in range(0, len(indices), LAND_PAGES):
            part = slice(at, at + LAND_PAGES)
            blocks = _Blocks(key, list(indices[part]), [layer[part] for layer in layers], list(generations[part]))
            self._arrived.append(blocks)

    def end(self, key: Key, first_token: TokenChunk, lost: Sequence[int]) -> None:
        """All blocks but those of `lost` have arrived."""
        self._arrived.append(Landed(key, first_token, bool(lost)))

    def write(self, *, everything: bool) -> list[tuple[Landing, Landed]]:
        """Write what has arrived, everything or one portion; those that have ended, which are open no more."""
        ended = []
        while self._arrived:
            arrived = self._arrived.popleft()
            if isinstance(arrived, Landed):
                landing = self._open.pop(arrived.key, None)
                if landing is not None:
                    ended.append((landing, arrived))
                continue
            self._write(arrived)
            if not everything:
                break
        return ended

    def abandon(self, key: Key) -> Landing | None:
        """Nothing more is wanted; what has landed is kept. The landing, which still holds its pages, if one is open."""
        landing = self._open.get(key)
        if landing is not None:
            for arrived in self._arrived:
                if isinstance(arrived, _Blocks) and arrived.key == key:
                    self._write(arrived)
            self.keep(landing)
            del self._open[key]
        return landing

    def keep(self, landing: Landing) -> None:
        """Leading blocks that are here stay in the prefix cache: nobody need fetch or compute them again."""
        end = landing.num_cached
        while end in landing.written:
            end += 1
        sequence = landing.sequence
        self._memory.store(sequence, min(end * self._memory.page_size, len(sequence.token_ids)))

    def _write(self, blocks: _Blocks) -> None:
        """What is no longer wanted, or does not match its page's generation, is dropped."""
        landing = self._open.get(blocks.key)
        if landing is None:
            return
        pages = [landing.sequence.pages[i] for i in blocks.indices]
        if [self._memory.generation(page) for page in pages] == blocks.generations:
            self._writer.scatter(pages, blocks.layers)
            landing.written.update(blocks.indices)
