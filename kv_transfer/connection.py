"""KvConnection: frames with payload over a non-blocking socket; no payload byte is copied on its way.

Plain readiness callbacks instead of an asyncio transport: payload is received straight into its final buffer and sent
from the arrays themselves (`sendmsg`), the same on asyncio and uvloop, on every Python version.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Protocol

import msgspec
import numpy as np

from engine_core.errors import ProtocolError, TransferError
from kv_transfer.channel import MALFORMED, set_socket_options
from kv_transfer.cipher import TAG_BYTES, FrameCipher
from kv_transfer.framing import HEAD, check_of
from kv_transfer.wire import MAX_HEADER_BYTES, KvBlocks, encode_body

READ_BYTES = 64 << 10
TURN_BYTES = 4 << 20  # moved per turn of the event loop at most, so that other connections get theirs
ROOM_BYTES = 8 << 20  # `on_room` while less than this is queued
MAX_IOV = 512
LOW_WATER_BYTES = 512 << 10  # of a payload wake us, while more than twice as many are to come


class ConnectionEvents(Protocol):
    """What the owner of a connection hears. Any of the first three may raise ProtocolError, which closes it."""

    def on_message(self, connection: KvConnection, message: Any) -> None:
        """A message behind which no payload follows."""
        ...

    def on_header(self, connection: KvConnection, header: KvBlocks) -> np.ndarray | None:
        """Where the payload that follows shall go, `[num_bytes]` u8; None: nowhere."""
        ...

    def on_payload(self, connection: KvConnection, header: KvBlocks, payload: np.ndarray) -> None:
        """The payload is complete."""
        ...

    def on_room(self, connection: KvConnection) -> None:
        """Little is queued: more may be sent."""
        ...

    def on_closed(self, connection: KvConnection, error: Exception) -> None:
        """Gone. Fires once, never from within a call."""
        ...


class KvConnection:
    """One end. Everything runs on the event-loop thread.

    Attributes:
        cipher: seals what is sent and opens what is received from now on; None: everything travels in the clear.
        events: who hears of it; may be reassigned at any time, so a handshake can hand the connection over.
        queued_bytes: that have not left.
    """

    def __init__(
        self, connected: socket.socket, decoder: msgspec.msgpack.Decoder[Any], events: ConnectionEvents
    ) -> None:
        self.closed = False
        self.queued_bytes = 0
        self.max_header_bytes = MAX_HEADER_BYTES
        self.cipher: FrameCipher | None = None
        self._loop = asyncio.get_running_loop()
        self.heard_at = self.sent_at = self._loop.time()
        self._socket = connected
        self._decode = decoder.decode
        self.events = events
        self._num_received = self._num_sent = 0
        self._out: deque[memoryview] = deque()
        self._is_writing = False
        self._in = bytearray()
        self._header: KvBlocks | None = None
        self._target: np.ndarray | None = None
        self._payload = memoryview(b"")
        self._rest = 0  # bytes of the current payload still to come
        self._low_water = 1  # bytes that wake us
        connected.setblocking(False)
        set_socket_options(connected)
        self._loop.add_reader(connected, self._on_readable)

    def send(self, message: msgspec.Struct, payload: Sequence[memoryview] = ()) -> None:
        """Queue a message and what follows it; the payload must not change until it has left."""
        if self.closed:
            return
        for piece in self._sealed(message, payload):
            self._out.append(memoryview(piece))
            self.queued_bytes += len(piece)
        if not self._is_writing:
            self._write()

    def _sealed(self, message: msgspec.Struct, payload: Sequence[memoryview]) -> Iterable[bytes | memoryview]:
        body = encode_body(message)
        if self.cipher is not None:
            body = self.cipher.seal([body])
            payload = [memoryview(self.cipher.seal(payload))] if payload else []
        head = HEAD.pack(len(body), check_of(body, self._num_sent))
        self._num_sent += 1
        return (head, body, *payload)

    def close(self, error: Exception) -> None:
        """Close at once."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._out.clear()
        self._target, self._payload = None, memoryview(b"")
        self.queued_bytes = 0
        self._loop.call_soon(lambda: self.events.on_closed(self, error))

    # Writing

    def _write(self) -> None:
        """Send until the kernel is full, the queue empty, or this turn over."""
        budget = TURN_BYTES
        try:
            while self._out and budget > 0:
                sent = self._socket.sendmsg(list(islice(self._out, MAX_IOV)))
                budget -= sent
                if not self._forget(sent):  # it is full: to ask again would move little, or be refused
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(TransferError(f"connection lost: {error}"))
            return
        self.sent_at = self._loop.time()
        if bool(self._out) != self._is_writing:
            self._is_writing = bool(self._out)
            if self._is_writing:
                self._loop.add_writer(self._socket, self._on_writable)
            else:
                self._loop.remove_writer(self._socket)

    def _on_writable(self) -> None:
        self._write()
        if not self.closed and self.queued_bytes < ROOM_BYTES:
            self.events.on_room(self)

    def _forget(self, sent: int) -> bool:
        """Whether whole pieces have left; of one that was cut, the rest stays."""
        self.queued_bytes -= sent
        while sent:
            first = self._out.popleft()
            if len(first) > sent:
                self._out.appendleft(first[sent:])
                return False
            sent -= len(first)
        return True

    # Reading

    def read(self) -> None:
        """Take what has arrived, though it may be too little to wake us."""
        if not self.closed:
            self._on_readable()

    def _on_readable(self) -> None:
        budget = TURN_BYTES
        try:
            while budget > 0 and not self.closed:
                asked, received = self._receive()
                if not received:
                    raise TransferError("the peer closed the connection")
                self.heard_at = self._loop.time()
                budget -= received
                if received < asked:  # no more is there: to ask again would only be refused
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(TransferError(f"connection lost: {error}"))
        except (ProtocolError, TransferError) as error:
            self.close(error)
        except BaseException:
            self.close(TransferError("internal error while receiving"))  # our own bug: the loop logs it
            raise

    def _receive(self) -> tuple[int, int]:
        """Bytes asked for, and received."""
        if asked := self._rest if self._payload else 0:
            received = self._socket.recv_into(self._payload[-asked:])
            self._set_low_water(asked - received)
            self._advance(received)
            return asked, received
        fresh = self._socket.recv(READ_BYTES)
        self._in += fresh
        self._parse()
        return READ_BYTES, len(fresh)

    def _set_low_water(self, rest: int) -> None:
        """Of much that is to come, little wakes nobody: a wake-up costs as much as a hundred KiB."""
        low_water = LOW_WATER_BYTES if rest > 2 * LOW_WATER_BYTES else 1
        if low_water != self._low_water:
            self._low_water = low_water
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)

    def _parse(self) -> None:
        """Consume all that is whole in `_in`."""
        position = 0
        view = memoryview(self._in)
        try:
            while not self.closed:
                if self._rest:
                    taken = min(self._rest, len(view) - position)
                    if self._payload:
                        at = len(self._payload) - self._rest
                        self._payload[at : at + taken] = view[position : position + taken]
                    position += taken
                    self._advance(taken)
                    if self._rest:
                        break
                    continue
                end = self._header_end(view, position)
                if end < 0:
                    break
                self._on_frame(view[position:end])
                position = end
        finally:
            view.release()
            del self._in[:position]

    def _header_end(self, view: memoryview, position: int) -> int:
        """End of the message that begins at `position`; -1 while it is not whole."""
        if len(view) - position < HEAD.size:
            return -1
        size, _ = HEAD.unpack_from(view, position)
        if size > self.max_header_bytes:
            raise ProtocolError(f"message of {size} bytes exceeds {self.max_header_bytes}")
        end: int = position + HEAD.size + size
        return end if end <= len(view) else -1

    def _on_frame(self, frame: memoryview) -> None:
        with frame, frame[HEAD.size :] as body:
            if HEAD.unpack_from(frame)[1] != check_of(body, self._num_received):
                raise ProtocolError(f"message {self._num_received} is damaged or out of order")
            self._num_received += 1
            try:
                message = self._decode(self.cipher.open(body) if self.cipher else body)
            except MALFORMED as error:
                raise ProtocolError(f"malformed message: {error}") from error
        if isinstance(message, KvBlocks) and message.brings_payload:
            self._target = self.events.on_header(self, message)
            self._expect_payload(message)
        else:
            self.events.on_message(self, message)

    def _expect_payload(self, header: KvBlocks) -> None:
        """What arrives next goes to the target, or is opened into it once it is whole, or is skipped."""
        self._header, self._rest = header, header.num_bytes
        if self.cipher is not None:
            self._rest += TAG_BYTES
            self._payload = memoryview(bytearray(self._rest))
        else:
            self._payload = memoryview(b"") if self._target is None else self._target.data

    def _advance(self, received: int) -> None:
        self._rest -= received
        if not received or self._rest or self._header is None:
            return
        header, target, payload = self._header, self._target, self._payload
        self._header, self._target, self._payload = None, None, memoryview(b"")
        if self.cipher is not None and target is not None:
            self.cipher.open_into(payload, target)
        elif self.cipher is not None:
            self.cipher.open(payload)
        if target is not None:
            self.events.on_payload(self, header, target)
