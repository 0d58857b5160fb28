"""Channel: typed messages over one TCP connection, for the control plane.

A frame (`framing`) holds one message in msgpack. Everything here runs on the event-loop thread.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import msgspec

from engine_core.errors import ProtocolError
from engine_core.messages import GatewayToWorker, Message, WorkerToGateway
from kv_transfer.framing import HEAD, check_of

MAX_FRAME_BYTES = 64 << 20
MAX_PENDING_BYTES = 256 << 20  # a peer that leaves this much unread is cut off
WRITE_HIGH_BYTES = 1 << 20
READ_BYTES = 256 << 10  # at a time, as asyncio does
KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 3000}  # s, s, count, ms

MALFORMED = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)
"""What decoding hostile bytes can raise; UnicodeDecodeError is a ValueError."""

_encode = msgspec.msgpack.Encoder().encode

from_gateway: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(GatewayToWorker)
from_worker: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(WorkerToGateway)

OnMessage = Callable[["Channel", Any], None]
OnClosed = Callable[["Channel", Exception | None], None]


class Channel(asyncio.BufferedProtocol):
    """One end of a connection: `on_message(channel, message)` per frame, `on_closed(channel, error)` once.

    `on_message` may raise ProtocolError, which closes this connection and nothing else; it may be reassigned at any
    time, so a handshake is a chain of callbacks. `error` is what ended the connection, None for an orderly close.

    Args:
        decoder: of the messages this end accepts.
        on_open: called once connected; may send.
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[Any],
        on_open: Callable[[Channel], None],
        on_message: OnMessage,
        on_closed: OnClosed,
    ) -> None:
        self.on_message = on_message
        self.max_frame_bytes = MAX_FRAME_BYTES
        self.max_pending_bytes = MAX_PENDING_BYTES
        self.closed = False
        self.writable = True
        self._decode = decoder.decode
        self._on_open = on_open
        self._received = memoryview(bytearray(READ_BYTES))  # ours: asyncio's own would be mapped anew for every read
        self._on_closed = on_closed
        self._in = bytearray()
        self._needed = HEAD.size  # bytes of `_in` that complete its first frame
        self._num_received = self._num_sent = 0
        self._out = bytearray()
        self._flush_scheduled = False
        self._error: Exception | None = None
        self._drained = asyncio.Event()
        self._drained.set()
        self._transport: asyncio.Transport
        self._loop: asyncio.AbstractEventLoop

    def send(self, message: Message) -> bool:
        """Queue a message; all those of one loop iteration leave together.

        Returns:
            Whether more may follow at once; False when the peer is slow (await `drained`) or gone (`closed`).
        """
        if self.closed:
            return False
        body = _encode(message)
        if len(body) > MAX_FRAME_BYTES:
            raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes exceeds the frame limit")
        self._out += HEAD.pack(len(body), check_of(body, self._num_sent))
        self._out += body
        self._num_sent += 1
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)
        return self.writable

    async def drained(self) -> None:
        """Wait until the peer keeps up again, or is gone."""
        await self._drained.wait()

    @property
    def pending_bytes(self) -> int:
        """Bytes queued here, not counting what the kernel holds."""
        return len(self._out) + (0 if self.closed else self._transport.get_write_buffer_size())

    @property
    def peername(self) -> str:
        """Address of the other end, for logs."""
        return str(self._transport.get_extra_info("peername"))

    def time(self) -> float:
        """The event loop's clock."""
        return self._loop.time()

    def close(self) -> None:
        """Send what is queued, then close."""
        if not self.closed:
            self._write_out()
            self._transport.close()

    def abort(self, error: Exception) -> None:
        """Close at once; `error` goes to `on_closed`."""
        if self._error is None:
            self._error = error
        self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self._loop = asyncio.get_running_loop()
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        set_socket_options(transport.get_extra_info("socket"))
        self._on_open(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive."""
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        """Deliver every whole frame; keep the rest."""
        if not self._in:
            self._in += self._deliver(self._received[:nbytes])
            return
        self._in += self._received[:nbytes]
        if len(self._in) >= self._needed:
            received, self._in = self._in, bytearray()
            self._in += self._deliver(memoryview(received))

    def connection_lost(self, exc: Exception | None) -> None:
        """Disconnected, by whoever."""
        self.closed = True
        self.writable = False
        self._out.clear()
        self._drained.set()
        self._on_closed(self, self._error or exc)

    def pause_writing(self) -> None:
        """The peer is slower than we are."""
        self.writable = False
        self._drained.clear()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self.writable = True
        self._drained.set()
        self._write_out()

    def _deliver(self, view: memoryview) -> memoryview:
        """Hand the whole frames in `view` to `on_message`; return what follows them."""
        position, end = 0, len(view)
        self._needed = HEAD.size
        while end - position >= HEAD.size:
            size, check = HEAD.unpack_from(view, position)
            if size > self.max_frame_bytes:
                self.abort(ProtocolError(f"frame of {size} bytes exceeds {self.max_frame_bytes}"))
                return view[:0]
            body = position + HEAD.size
            if end - body < size:
                self._needed = HEAD.size + size
                break
            position = body + size
            self._receive(view[body:position], check)
            if self._error is not None or self._transport.is_closing():
                return view[:0]
        return view[position:]

    def _receive(self, body: memoryview, check: int) -> None:
        if check != check_of(body, self._num_received):
            self.abort(ProtocolError(f"frame {self._num_received} is damaged or out of order"))
            return
        self._num_received += 1
        try:
            message = self._decode(body)
        except MALFORMED as error:
            self.abort(ProtocolError(f"malformed message: {error}"))
            return
        try:
            self.on_message(self, message)
        except ProtocolError as error:
            self.abort(error)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self.writable:
            self._write_out()
        elif len(self._out) > self.max_pending_bytes:
            self.abort(ProtocolError(f"the peer left {len(self._out)} bytes unread"))

    def _write_out(self) -> None:
        if self._out and not self._transport.is_closing():
            out, self._out = self._out, bytearray()  # the transport may keep the buffer
            self._transport.write(out)


def set_socket_options(connection: socket.socket | None) -> None:
    """No delay; a peer whose machine vanished is an error within seconds (Linux; elsewhere what exists of it)."""
    if connection is None or connection.family == getattr(socket, "AF_UNIX", None):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
