"""What connections write in one round of the event loop leaves at its end, one connection after the other.

A write to a socket wakes who reads it. Between two writes of a round the gateway computes, so that a client, or the
interrupt handler of a network card, has gone to sleep again by the next one: waking it costs more than the rest of the
call.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Outbox:
    """Of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._filled: list[LateTransport] = []

    def add(self, transport: LateTransport) -> None:
        """It has something to write, for the first time in this round."""
        if not self._filled:
            self._loop.call_soon(self._flush)
        self._filled.append(transport)

    def _flush(self) -> None:
        filled, self._filled = self._filled, []
        for transport in filled:
            transport.flush()


class LateTransport(asyncio.Transport):
    """A connection whose writes wait for the end of the round; it is closed behind them.

    Args:
        transport: the loop's own.
    """

    def __init__(self, transport: asyncio.Transport, outbox: Outbox) -> None:
        super().__init__()
        self._transport = transport
        self._outbox = outbox
        self._written: list[bytes] = []
        self.is_closing = transport.is_closing  # type: ignore[method-assign]  # called for every response
        self.pause_reading = transport.pause_reading  # type: ignore[method-assign]
        self.resume_reading = transport.resume_reading  # type: ignore[method-assign]

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See asyncio. `data` must not change any more."""
        if not self._written:
            self._outbox.add(self)
        self._written.append(bytes(data))

    def flush(self) -> None:
        """Write now."""
        written, self._written = self._written, []
        if written and not self._transport.is_closing():
            self._transport.write(written[0] if len(written) == 1 else b"".join(written))

    def close(self) -> None:
        """See asyncio."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """See asyncio."""
        self._written.clear()
        self._transport.abort()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See asyncio."""
        return self._transport.get_extra_info(name, default)
