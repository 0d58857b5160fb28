"""An event loop on a thread of its own, and the beats by which hosts of one worker know of each other's death.

Its own thread: the worker's event loop serves gateways, and is held up while a model loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

BEAT_S = 0.25
LAST_WORD_S = 0.05
SILENT_BEATS = 7  # of ours without one of theirs: about 1.75 s
STARTING_BEATS = 480  # while weights load and devices are opened, which may hold a whole process up: 2 min


class HostLoop:
    """The thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the thread and wait for the result. From any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def post(self, function: Callable[..., object], *arguments: object) -> None:
        """Run on the thread, later. From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(function, *arguments)

    def close(self, finish: Callable[[], object]) -> None:
        """Call `finish` on the thread, let it say its last word, and end it. Again: nothing."""
        self.post(self._finish, finish)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _finish(self, finish: Callable[[], object]) -> None:
        finish()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.call_later(LAST_WORD_S, self.loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()


def how_it_ended(error: Exception | None) -> str:
    """Of a connection, in words. A killed process leaves it closed, or reset where bytes lay unread."""
    return "it hung up" if error is None or isinstance(error, ConnectionError) else str(error)
