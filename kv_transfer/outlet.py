"""A worker's sender as its engine thread uses it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from kv_transfer.plane_sender import PlaneKvSender
from kv_transfer.sender import NetKvSender


class Outlet:
    """A sender that is full for a while; the engine thread, which sleeps meanwhile, is woken when it is not any more.

    Construct on the event-loop thread.

    Args:
        sender: takes blocks.
        wake: lets the engine thread run, at least once.
    """

    def __init__(self, sender: PlaneKvSender | NetKvSender, wake: Callable[[], None]) -> None:
        self.sender = sender
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._waker: asyncio.Task[None] | None = None

    @property
    def writable(self) -> bool:
        """Whether more blocks are welcome; else pages stay on the device. Any thread."""
        if self.sender.writable:
            return True
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
            self._loop.call_soon_threadsafe(self._wake_when_writable)
        return False

    async def close(self) -> None:
        """Close the sender."""
        if self._waker is not None:
            self._waker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._waker
        await self.sender.close()

    def _wake_when_writable(self) -> None:
        if self._waker is None or self._waker.done():
            self._waker = self._loop.create_task(self._wait())

    async def _wait(self) -> None:
        await self.sender.wait_writable()
        self._wake()
