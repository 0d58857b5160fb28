"""KvSender and KvReceiver whose work is done in a data-plane process beside the worker.

A receiving thread in a busy Python process moves a third of what it could and slows the engine; here the worker only
copies blocks into memory that the plane maps (prefill), or reads them where the plane or the peer put them (decode).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine_core.errors import BatonError, ConfigError, ProtocolError, TransferError
from engine_core.messages import Message, PeerAddress, TokenChunk
from kv_transfer.arena import Arena, Segment
from kv_transfer.auth import check_bind
from kv_transfer.base import Layers, ReceiverEvents, SenderEvents
from kv_transfer.blocks import as_layers, as_rows, payload_rows, strided_bytes, strided_rows
from kv_transfer.channel import Channel
from kv_transfer.commands import Commands
from kv_transfer.compiled.digester import open_digester
from kv_transfer.digester import STREAM_BYTES
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.layout import BlockLayout
from kv_transfer.plane_wire import (
    PlaneAbort,
    PlaneBlocks,
    PlaneCancel,
    PlaneDone,
    PlaneFinish,
    PlaneForget,
    PlaneOffer,
    PlanePush,
    PlaneReady,
    PlaneRefused,
    PlaneRetire,
    PlaneReturn,
    PlaneSegment,
    PlaneStart,
    PlaneTicket,
    abort_of,
    error_of,
    to_worker,
)
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.returns import Returns
from kv_transfer.sender import FRAME_BYTES, MAX_FRAME_BYTES, NetKvSender
from kv_transfer.ticket import Ticket
from kv_transfer.wire import Place, Transport

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
MIN_LOANS = 4  # blocks that an arena has room for at the least
PIPELINE_FRAMES = 8  # in an arena at the least, so that all processes on the way work at once
Key = tuple[str, int]


def open_sender(
    identity: KvIdentity,
    secret: bytes | None,
    events: SenderEvents,
    options: TransferOptions,
    process: PlaneProcess | None = None,
) -> PlaneKvSender | NetKvSender:
    """A worker's sender: with a data plane where processes can share memory; in `process`, or one of its own."""
    if sys.platform == "linux":
        return PlaneKvSender(identity, secret, events, options, process)
    return NetKvSender(identity, secret, events, options.arena_bytes, options)


def open_receiver(
    identity: KvIdentity,
    secret: bytes | None,
    events: ReceiverEvents,
    options: TransferOptions,
    process: PlaneProcess | None = None,
) -> PlaneKvReceiver | NetKvReceiver:
    """What talks to the hosts of those who hand over, likewise."""
    if sys.platform == "linux":
        return PlaneKvReceiver(identity, secret, events, options, process)
    return NetKvReceiver(identity, secret, events, options)


class PlaneProcess:
    """The other process. It ends when all who talk to it have hung up; it starts when the first connects.

    Args:
        num_ends: who will connect: a sender, a receiver, or both.
    """

    def __init__(self, num_ends: int = 1) -> None:
        self._num_ends = num_ends
        self._free: list[socket.socket] = []
        self.popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process, once it has been started."""
        assert self.popen is not None
        return self.popen.pid

    def connect(self) -> socket.socket:
        """One end; to be called `num_ends` times."""
        if self.popen is None:
            pairs = [socket.socketpair() for _ in range(self._num_ends)]
            self._free = [mine for mine, _ in pairs]
            self.popen = _spawn([theirs for _, theirs in pairs])
            for _, theirs in pairs:
                theirs.close()
        return self._free.pop()

    async def leave(self) -> None:
        """An end was closed; whoever closes the last one waits for the end of the process."""
        self._num_ends -= 1
        if not self._num_ends:
            await self.end()

    async def end(self) -> None:
        """No further end will be connected; the others have been closed, or their owner is about to fail."""
        for mine in self._free:
            mine.close()
        self._free.clear()
        assert self.popen is not None
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, self.popen.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            await loop.run_in_executor(None, self.popen.wait)


class _Listener(Protocol):
    """The endpoint over a plane."""

    def on_message(self, message: Any) -> None:
        """From the plane."""

    def on_lost(self) -> None:
        """The plane is gone."""


class _Plane:
    """A channel to the other process."""

    def __init__(self, listener: _Listener, process: PlaneProcess | None) -> None:
        self._listener = listener
        self._shared = process
        self._process: PlaneProcess
        self._ready: asyncio.Future[PlaneReady]
        self._channel: Channel
        self._commands: Commands
        self._is_closing = False

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def start(
        self, identity: KvIdentity, secret: bytes | None, options: TransferOptions, host: str, port: int
    ) -> int:
        """Connect to the process; returns the port on which it listens."""
        loop = asyncio.get_running_loop()
        self._process = self._shared or PlaneProcess()
        mine = self._process.connect()
        self._ready = loop.create_future()
        self._commands = Commands(mine)
        make = lambda: Channel(to_worker, lambda channel: None, self._on_message, self._on_closed)  # noqa: E731
        _, self._channel = await loop.create_connection(make, sock=mine)
        self.send(
            PlaneStart(
                identity.worker_id,
                identity.incarnation,
                identity.fingerprint,
                dataclasses.asdict(identity.layout),
                secret,
                host,
                port,
                tuple(options.transports),
                options.num_connections,
                options.arena_bytes,
                options.encrypts,
                str(options.library or ""),
            )
        )
        try:
            ready = await asyncio.wait_for(self._ready, START_TIMEOUT_S)
        except TimeoutError:
            ready = PlaneReady(0, f"the data plane did not start within {START_TIMEOUT_S} s")
        if ready.problem:
            self._hang_up()
            await self._process.end()
            raise ConfigError(ready.problem)
        return ready.port

    def send(self, message: Message) -> None:
        """On any thread."""
        self._commands.send(message)

    async def close(self) -> None:
        """Hang up, and wait for the end of the process where nobody else talks to it."""
        self._hang_up()
        await self._process.leave()

    def _hang_up(self) -> None:
        self._is_closing = True
        self._commands.close()
        self._channel.close()

    def _on_message(self, channel: Channel, message: Any) -> None:
        if isinstance(message, PlaneReady) and not self._ready.done():
            self._ready.set_result(message)
        else:
            self._listener.on_message(message)

    def _on_closed(self, channel: Channel, error: Exception | None) -> None:
        self._commands.close()
        if not self._ready.done():
            self._ready.set_result(PlaneReady(0, "the data plane ended while it started"))
        if not self._is_closing:
            logger.error("the data plane is gone (%s)", error or "it hung up")
            self._listener.on_lost()


def _spawn(connected: list[socket.socket]) -> subprocess.Popen[bytes]:
    """The process whose ends of socket pairs `connected` are; it must find this package where we found it."""
    descriptors = [each.fileno() for each in connected]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "kv_transfer.plane_process", *map(str, descriptors)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )


@dataclass(frozen=True, slots=True)
class _Unstaged:
    """Blocks that found no room in shared memory; `streams`: see Digester."""

    key: Key
    indices: tuple[int, ...]
    rows: tuple[np.ndarray, ...]
    streams: bool


class PlaneKvSender:
    """KvSender of a worker, its plane in `process` or one of its own. Construct on the event-loop thread."""

    def __init__(
        self,
        identity: KvIdentity,
        secret: bytes | None,
        events: SenderEvents,
        options: TransferOptions,
        process: PlaneProcess | None = None,
    ) -> None:
        self.healthy = True
        self._identity = identity
        self._secret = secret
        self._events = events
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._plane = _Plane(self, process)
        self._digester = open_digester(options.library)
        self._arena_bytes = max(options.arena_bytes, MIN_LOANS * identity.layout.block_bytes)
        self._lock = threading.Lock()  # over the following
        self._arena = Arena(self._arena_bytes)
        self._segment = 1
        self._loans: dict[int, tuple[np.ndarray, int]] = {}
        self._next_loan = 1
        self._inflight_bytes = 0
        self._queue: deque[Message | _Unstaged] = deque()  # behind blocks that have no room
        self._open: dict[Key, Transport | None] = {}  # by which way, once that is known
        self._room = asyncio.Event()
        self.on_refused: Callable[[str], None] = lambda code: None
        """See NetKvSender."""

    async def start(self, host: str, port: int) -> int:
        """Start the plane, which listens; port 0 takes any free one. Returns the port."""
        check_bind(host, self._secret)
        self._options.check_secret(self._secret)
        port = await self._plane.start(self._identity, self._secret, self._options, host, port)
        self._announce()
        return port

    @property
    def plane_pid(self) -> int:
        """Of the other process."""
        return self._plane.pid

    # KvSender

    @property
    def inflight_bytes(self) -> int:
        """See KvSender."""
        return self._inflight_bytes

    @property
    def writable(self) -> bool:
        """See KvSender."""
        return not self._queue and self._inflight_bytes < self._arena_bytes // 2

    async def wait_writable(self) -> None:
        """See KvSender."""
        while not self.writable:
            self._room.clear()
            await self._room.wait()

    def offer(self, request_id: str, epoch: int, lease_s: float) -> None:
        """See KvSender."""
        self._open[request_id, epoch] = None
        self._put(PlaneOffer(request_id, epoch, lease_s))

    def send_blocks(self, request_id: str, epoch: int, block_indices: Sequence[int], layers: Layers) -> None:
        """See KvSender. Copies, a frame at a time, so that the plane begins with the first while the next is copied."""
        indices = tuple(int(index) for index in block_indices)
        layout = self._identity.layout
        rows = as_rows(layers, len(indices), layout)
        to_socket = self._open.get((request_id, epoch)) is Transport.TCP
        streams = not to_socket and len(indices) * layout.block_bytes > STREAM_BYTES
        start = 0
        while start < len(indices):
            each = self._frame_blocks(0 if to_socket else len(indices) - start)
            part = slice(start, start + each)
            blocks = _Unstaged((request_id, epoch), indices[part], tuple(row[part] for row in rows), streams)
            with self._lock:
                self._inflight_bytes += self._num_bytes(blocks)
            self._put(blocks)
            start += each

    def finish(self, request_id: str, epoch: int, first_token: TokenChunk) -> None:
        """See KvSender."""
        self._open.pop((request_id, epoch), None)
        self._put(PlaneFinish(request_id, epoch, first_token))

    def abort(self, request_id: str, epoch: int, error: BatonError) -> None:
        """See KvSender."""
        self._open.pop((request_id, epoch), None)
        self._drop_unstaged((request_id, epoch))
        self._put(abort_of(request_id, epoch, error))

    async def close(self) -> None:
        """See KvSender."""
        await self._plane.close()

    # From the plane, on the event loop

    def on_message(self, message: Any) -> None:
        """See KvSender's events."""
        match message:
            case PlaneTicket(ticket, _, transport):
                if ticket.key in self._open:
                    self._open[ticket.key] = transport
                self._events.on_ticket(ticket)
            case PlaneAbort(request_id, epoch):
                self._open.pop((request_id, epoch), None)
                self._drop_unstaged((request_id, epoch))
                self._events.on_cancel(request_id, epoch, error_of(message))
            case PlaneReturn(loans):
                self._on_return(loans)
            case PlaneRetire(segment):
                self._retire(segment)
            case PlaneRefused(code):
                self.on_refused(code)
            case _:
                raise ProtocolError(f"{type(message).__name__} from the data plane")

    def on_lost(self) -> None:
        """Nothing can be handed over any more."""
        self.healthy = False
        lost, self._open = self._open, {}
        with self._lock:
            self._loans.clear()
            self._queue.clear()
            self._inflight_bytes = 0
        self._room.set()
        for request_id, epoch in lost:
            self._events.on_cancel(request_id, epoch, TransferError("the data plane of the sender is gone"))

    # Staging

    def _frame_blocks(self, rest: int) -> int:
        """Blocks of the next frame while so many are left; sockets take small ones.

        What a frame costs beside its bytes is paid less often if it is large; the last are small, as nobody works
        beside who verifies those.
        """
        block_bytes = self._identity.layout.block_bytes
        most = min(MAX_FRAME_BYTES, max(FRAME_BYTES, self._arena_bytes // PIPELINE_FRAMES))
        return max(1, min(max(FRAME_BYTES, rest * block_bytes // 2), most) // block_bytes)

    def _num_bytes(self, blocks: _Unstaged) -> int:
        return len(blocks.indices) * self._identity.layout.block_bytes

    def _put(self, item: Message | _Unstaged) -> None:
        """Any thread: send behind all that was put before, at once unless something waits for room."""
        with self._lock:
            if not self.healthy:
                self._inflight_bytes = 0
                return
            if self._queue:
                self._queue.append(item)
                return
            message = self._stage(item) if isinstance(item, _Unstaged) else item
            if message is None:
                self._queue.append(item)
                return
            self._plane.send(message)

    def _stage(self, blocks: _Unstaged) -> PlanePush | None:
        """Copy into shared memory; None while there is no room. Holds the lock: only the worker's threads wait."""
        num_bytes, n = self._num_bytes(blocks), len(blocks.indices)
        loan = self._arena.lend(num_bytes, lambda: None)
        if loan is None:
            return None
        offset, memory = loan
        layout = self._identity.layout
        digests = self._digester.copy(blocks.rows, payload_rows(memory, n, layout), streams=blocks.streams)
        number = self._next_loan
        self._next_loan += 1
        self._loans[number] = (memory, num_bytes)
        place = Place(self._segment, offset, n * layout.layer_bytes)
        return PlanePush(*blocks.key, blocks.indices, digests, place, number)

    def _on_return(self, loans: tuple[int, ...]) -> None:
        with self._lock:
            for loan in loans:
                _, num_bytes = self._loans.pop(loan)
                self._inflight_bytes -= num_bytes
        self._pump()

    def _pump(self) -> None:
        """Send what waited for room, in order, as far as it goes."""
        with self._lock:
            while self._queue:
                item = self._queue[0]
                message = self._stage(item) if isinstance(item, _Unstaged) else item
                if message is None:
                    break
                self._queue.popleft()
                self._plane.send(message)
        if self.writable:
            self._room.set()

    def _drop_unstaged(self, key: Key) -> None:
        with self._lock:
            kept: deque[Message | _Unstaged] = deque()
            for item in self._queue:
                if isinstance(item, _Unstaged) and item.key == key:
                    self._inflight_bytes -= self._num_bytes(item)
                else:
                    kept.append(item)
            has_changed, self._queue = len(kept) < len(self._queue), kept
        if has_changed:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
                self._loop.call_soon_threadsafe(self._pump)

    def _retire(self, segment: int) -> None:
        """What a lost reader may still read is never written again: new memory."""
        with self._lock:
            if segment == self._segment:
                self._arena = Arena(self._arena_bytes)
                self._segment += 1
        self._announce()

    def _announce(self) -> None:
        assert self._arena.segment.ref
        self._plane.send(PlaneSegment(self._segment, self._arena.segment.ref))


class PlaneKvReceiver:
    """KvReceiver of a worker, its plane in `process` or one of its own. Construct on the event-loop thread."""

    def __init__(
        self,
        identity: KvIdentity,
        secret: bytes | None,
        events: ReceiverEvents,
        options: TransferOptions,
        process: PlaneProcess | None = None,
    ) -> None:
        self.healthy = True
        self._identity = identity
        self._secret = secret
        self._events = events
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._plane = _Plane(self, process)
        self._segments: dict[int, Segment] = {}
        self._returns = Returns(lambda loans: self._plane.send(PlaneReturn(loans)))
        self._lock = threading.Lock()  # over the following, with `healthy`
        self._open: dict[Key, BlockLayout] = {}  # of the heads that the hand-off brings

    async def start(self) -> None:
        """Start the plane."""
        self._options.check_secret(self._secret)
        await self._plane.start(self._identity, self._secret, self._options, "", 0)

    @property
    def plane_pid(self) -> int:
        """Of the other process."""
        return self._plane.pid

    @property
    def num_open(self) -> int:
        """Hand-offs under way."""
        return len(self._open)

    # KvReceiver

    def request(self, address: PeerAddress, ticket: Ticket) -> None:
        """See KvReceiver."""
        with self._lock:
            if self.healthy:
                self._open[ticket.key] = self._identity.facing(address).layout
                self._plane.send(PlaneTicket(ticket, address, None))
                return
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
            self._loop.call_soon_threadsafe(self._fail, ticket.key)

    def cancel(self, request_id: str, epoch: int) -> None:
        """See KvReceiver."""
        self._open.pop((request_id, epoch), None)
        self._plane.send(PlaneCancel(request_id, epoch))

    async def close(self) -> None:
        """See KvReceiver."""
        await self._plane.close()

    # From the plane, on the event loop

    def on_message(self, message: Any) -> None:
        """See ReceiverEvents. What was cancelled meanwhile is dropped."""
        match message:
            case PlaneBlocks():
                self._on_blocks(message)
            case PlaneDone(request_id, epoch, first_token, lost):
                if self._end((request_id, epoch)):
                    self._events.on_done(request_id, epoch, first_token, lost)
            case PlaneAbort(request_id, epoch):
                if self._end((request_id, epoch)):
                    self._events.on_failed(request_id, epoch, error_of(message))
            case PlaneSegment(number, ref):
                self._segments[number] = Segment.open(ref)
            case PlaneForget(numbers):
                for number in numbers:
                    del self._segments[number]
            case _:
                raise ProtocolError(f"{type(message).__name__} from the data plane")

    def on_lost(self) -> None:
        """Nothing can be received any more."""
        with self._lock:
            self.healthy = False
            lost, self._open = self._open, {}
        for key in lost:
            self._fail(key)

    def _fail(self, key: Key) -> None:
        self._events.on_failed(*key, TransferError("the data plane of the receiver is gone"))

    def _end(self, key: Key) -> bool:
        return self._open.pop(key, None) is not None

    def _on_blocks(self, message: PlaneBlocks) -> None:
        key = (message.request_id, message.epoch)
        layout = self._open.get(key)
        if layout is None:
            self._returns.add(message.loan)
            return
        place, n = message.place, len(message.indices)
        memory = self._segments[place.segment].lend(
            place.offset, strided_bytes(n, place.layer_stride, layout), lambda: self._returns.add(message.loan)
        )
        layers = as_layers(strided_rows(memory, n, place.layer_stride, layout), layout)
        self._events.on_blocks(*key, message.indices, layers, message.generations)
