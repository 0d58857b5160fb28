"""Ends of loans, collected on any thread and told together on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable


class Returns:
    """Collects numbers; construct on the event-loop thread.

    Args:
        tell: called on the event loop with all that came since the last time.
    """

    def __init__(self, tell: Callable[[tuple[int, ...]], object]) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._numbers: deque[int] = deque()
        self._is_scheduled = False

    def add(self, number: int) -> None:
        """On any thread, also from a finalizer."""
        self._numbers.append(number)
        if not self._is_scheduled:
            self._is_scheduled = True
            is_loop = threading.get_ident() == self._thread  # which need not be woken
            call = self._loop.call_soon if is_loop else self._loop.call_soon_threadsafe
            with contextlib.suppress(RuntimeError):  # the loop is closed
                call(self._flush)

    def _flush(self) -> None:
        self._is_scheduled = False
        numbers = []
        with contextlib.suppress(IndexError):
            while True:
                numbers.append(self._numbers.popleft())
        if numbers:
            self._tell(tuple(numbers))
