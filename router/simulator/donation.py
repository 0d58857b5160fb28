"""Blocks that one simulated worker fetches from another's prefix cache: both ends of it.

The donor holds what it has from the message until the last byte has been sent; who fetches holds pages for it, and
other prompts go before the one that waits. What has landed is in the prefix cache, and the prompt finds it there, if it
is still there, when its turn has come. What does not come is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine_core.errors import NoFreePages
from router.simulator.chunks import Reading
from router.simulator.clock import EventQueue
from router.simulator.job import Attempt
from router.simulator.links import Links
from router.simulator.memory import Memory


class Donations:
    """What a worker was asked to donate.

    Args:
        worker_id: of the worker.
        message_s: one way.
        is_alive: whether the worker is.
    """

    def __init__(
        self,
        events: EventQueue,
        links: Links,
        memory: Memory,
        worker_id: str,
        message_s: float,
        is_alive: Callable[[], bool],
    ) -> None:
        self._events = events
        self._links = links
        self._memory = memory
        self._worker_id = worker_id
        self._message_s = message_s
        self._is_alive = is_alive
        self._held: dict[Attempt, list[int]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, attempt: Attempt) -> None:
        """Hold the pages of what is here of the prompt's first `donor_blocks` blocks."""
        if self._is_alive() and not attempt.over:
            self._held[attempt] = self._memory.cache.match(attempt.job.hashes[: attempt.donor_blocks])

    def cancel(self, attempt: Attempt) -> None:
        """Nobody wants it any more. Unknown ones are fine."""
        self._memory.release(self._held.pop(attempt, []))

    def send(self, attempt: Attempt, first: int, block_bytes: int, fetches: Fetches) -> None:
        """Blocks from `first` on are wanted by `fetches`, which hears how many came: with the last byte, or at once."""
        count = max(len(self._held.get(attempt, ())) - first, 0) if self._is_alive() else 0
        sent_at = self._events.now
        if count:
            sent_at = self._links.send(self._worker_id, fetches.worker_id, count * block_bytes, sent_at)
        self._events.at(sent_at, self._sent, attempt, count, fetches)

    def _sent(self, attempt: Attempt, count: int, fetches: Fetches) -> None:
        self.cancel(attempt)
        self._events.after(self._message_s, fetches.landed, attempt, count if self._is_alive() else 0)


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Blocks from `first` on are under way to the pages behind those of the blocks before, which are held, too."""

    reading: Reading
    pages: list[int]
    first: int
    begun_at: float


class Fetches:
    """What a worker fetches.

    Args:
        on_landed: called with each attempt whose fetch is over, the blocks that came, and the seconds it took.
    """

    def __init__(
        self,
        events: EventQueue,
        memory: Memory,
        worker_id: str,
        message_s: float,
        block_bytes: int,
        on_landed: Callable[[Attempt, int, float], None],
    ) -> None:
        self.worker_id = worker_id
        self._events = events
        self._memory = memory
        self._message_s = message_s
        self._block_bytes = block_bytes
        self._on_landed = on_landed
        self._running: dict[Attempt, _Fetch] = {}

    def begin(self, reading: Reading) -> None:
        """Ask the prompt's donor, if it has one, for what is not here, where there are pages for it."""
        attempt = reading.attempt
        if attempt.donor is None:
            return
        wanted = attempt.job.hashes[: attempt.donor_blocks]
        pages = self._memory.cache.match(wanted)
        first = len(pages)
        try:
            pages += self._memory.cache.allocate(len(wanted) - first)
        except NoFreePages:
            wanted = wanted[:first]
        if len(wanted) == first:
            self._memory.release(pages)
            return
        self._running[attempt] = _Fetch(reading, pages, first, self._events.now)
        reading.num_awaited = len(wanted)
        self._events.after(self._message_s, attempt.donor.donations.send, attempt, first, self._block_bytes, self)

    def landed(self, attempt: Attempt, count: int) -> None:
        """So many blocks came, and no more will."""
        fetch = self._running.pop(attempt, None)
        if fetch is None:
            return
        end = fetch.first + count
        self._memory.store(attempt.job.hashes, fetch.pages, fetch.first, end * self._memory.page_size)
        self._memory.release(fetch.pages)
        fetch.reading.num_awaited = 0
        attempt.fetched = range(fetch.first, end)
        self._on_landed(attempt, count, self._events.now - fetch.begun_at)

    def cancel(self, attempt: Attempt) -> None:
        """Forget it. Unknown ones are fine."""
        fetch = self._running.pop(attempt, None)
        if fetch is not None:
            self._memory.release(fetch.pages)


def num_fetched(fetched: range, num_cached: int) -> int:
    """Of the blocks that were fetched, those that the prompt found when its turn had come."""
    return max(min(fetched.stop, num_cached) - fetched.start, 0)
