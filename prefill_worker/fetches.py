"""Leading blocks of prompts that wait, on their way from a donor into the prefix cache. Runs on the engine thread.

A fetch is an errand beside the queue: it holds pages for what it fetches until it ends, and then leaves the blocks to
the prefix cache, where the prompt finds them when its turn has come. However it ends, the prompt is computed from the
end of what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine_core.landings import Landing, Landings, PageWriter
from engine_core.messages import PeerAddress, TokenChunk
from engine_core.sequence import Sequence as Seq
from engine_core.sequence_memory import SequenceMemory

Key = tuple[str, int]

FETCH_S = 5.0  # for a fetch at most; what has landed by then is kept
MAX_SHARE = 0.5  # of the pages: others are to be had by prompts whose turn has come


@dataclass(frozen=True, slots=True)
class Source:
    """Where a prompt's leading blocks may be had.

    Attributes:
        donor: its address.
        num_blocks: how many it is believed to hold.
        deadline_s: what is left of the request's time.
    """

    donor: PeerAddress
    num_blocks: int
    deadline_s: float


class Fetches:
    """All that are under way.

    Args:
        memory: where the prefix cache and the pages are.
        writer: writes them.
        clock: seconds, monotonic.
    """

    def __init__(self, memory: SequenceMemory, writer: PageWriter, clock: Callable[[], float]) -> None:
        self._memory = memory
        self._landings = Landings(memory, writer)
        self._clock = clock
        self._until: dict[Key, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def begin(self, sequence: Seq, source: Source) -> list[tuple[int, int]]:
        """Reserve pages for what the prefix cache lacks of a prompt that waits.

        Returns:
            (block index, page generation) to ask the donor for; empty: there is nothing to fetch, or no room for it.
        """
        memory = self._memory
        num_blocks = min(source.num_blocks, (len(sequence.token_ids) - 1) // memory.page_size)
        room = MAX_SHARE * sum(shard.cache.pool.num_pages for shard in memory.shards)
        if num_blocks < 1 or not memory.block_namespace or sequence.scores_prompt:
            return []
        if self._landings.num_pages + num_blocks > room:
            return []
        prefix = Seq.of(sequence.request)
        del prefix.token_ids[num_blocks * memory.page_size :]
        prefix.hashes = sequence.hashes  # of the same tokens, and more
        if not memory.place(prefix, computes=False):
            return []
        if prefix.num_cached == len(prefix.token_ids):
            memory.release(prefix)
            return []
        self._until[prefix.key] = self._clock() + min(FETCH_S, source.deadline_s / 2)
        return self._landings.begin(prefix)

    def get(self, key: Key) -> Landing | None:
        """What has landed so far for a prompt; None: nothing is fetched for it."""
        return self._landings.get(key)

    def arrive(
        self, key: Key, indices: Sequence[int], layers: Sequence[np.ndarray], generations: Sequence[int]
    ) -> None:
        """Verified blocks arrived."""
        self._landings.arrive(key, indices, layers, generations)

    def end(self, key: Key, answer: TokenChunk, lost: Sequence[int]) -> None:
        """The donor has sent all it has; `answer` is empty."""
        self._landings.end(key, answer, lost)

    def write(self) -> list[Key]:
        """Write what has arrived; the prompts whose blocks are all here, or as many as will come."""
        ended = self._landings.write(everything=True)
        for landing, landed in ended:
            self._landings.keep(landing)
            self._forget(landed.key, landing)
        return [landed.key for _, landed in ended]

    def late(self) -> list[Key]:
        """Those that have taken too long: to be abandoned."""
        now = self._clock()
        return [key for key, until in self._until.items() if now >= until]

    def abandon(self, key: Key) -> None:
        """Go on with what has landed. Unknown keys are fine."""
        landing = self._landings.abandon(key)
        if landing is not None:
            self._forget(key, landing)

    def _forget(self, key: Key, landing: Landing) -> None:
        del self._until[key]
        self._memory.release(landing.sequence)
