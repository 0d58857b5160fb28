"""Virtual time: what shall happen, in the order of its due time; of equals, first come first served."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class EventQueue:
    """Runs callbacks.

    Attributes:
        now: seconds of virtual time.
        num_events: callbacks run so far.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, time: float, callback: Callable[..., object], *arguments: Any) -> None:
        """Call back at `time`; what is past happens now."""
        self._count += 1
        heapq.heappush(self._heap, (max(time, self.now), self._count, callback, arguments))

    def after(self, seconds: float, callback: Callable[..., object], *arguments: Any) -> None:
        """Call back in so many seconds."""
        self.at(self.now + seconds, callback, *arguments)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Run until that is so, or until nothing is left to happen."""
        heap = self._heap
        while heap and not is_over():
            self.now, _, callback, arguments = heapq.heappop(heap)
            self.num_events += 1
            callback(*arguments)
