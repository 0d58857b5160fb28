"""The decode worker's end of the hand-off: one session per prefill worker, opened when first needed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np

from engine_core import errors
from engine_core.errors import ProtocolError, TransferError, TransferTimeout
from engine_core.messages import PeerAddress
from kv_transfer import beats
from kv_transfer.arena import Arena, Segment
from kv_transfer.base import ReceiverEvents
from kv_transfer.blocks import LandedBlocks, as_rows, is_intact, strided_bytes, strided_rows
from kv_transfer.compiled.digester import open_digester
from kv_transfer.connection import KvConnection
from kv_transfer.endpoint import KvIdentity, ReceiverEndpoint
from kv_transfer.fabric import DeviceFabric, DevicePeer, Pulled
from kv_transfer.handshake import (
    HANDSHAKE_TIMEOUT_S,
    PROBE_BYTES,
    CallerHandshake,
    Offer,
    TransferOptions,
)
from kv_transfer.returns import Returns
from kv_transfer.wire import (
    KvBeat,
    KvBlocks,
    KvRelease,
    KvSegment,
    KvWelcome,
    Transport,
    check_header,
)

logger = logging.getLogger(__name__)

MAX_SEGMENTS = 4  # of one prefill worker mapped at a time; it has more than one only after it lost a reader

ARENA_WINDOWS = 4 / 3  # that it has room for: else frames of many sizes would find gaps, none of them large enough

PULL_S = 10.0  # for a frame from device to device, those before it included

Spot = tuple[str, int]
"""Host and port of a prefill worker."""


class NetKvReceiver(ReceiverEndpoint):
    """KvReceiver that connects to prefill workers of this and other hosts."""

    healthy = True
    """It has no process of its own that could end."""

    def __init__(
        self,
        identity: KvIdentity,
        secret: bytes | None,
        events: ReceiverEvents,
        options: TransferOptions,
        fabric: DeviceFabric | None = None,
    ) -> None:
        super().__init__(identity, events)
        self.fabric = fabric
        options.check_secret(secret)
        self.secret = secret
        self.options = options
        self.digester = open_digester(options.library)
        self.probe = Segment.create(PROBE_BYTES)
        self._links: dict[Spot, _ToPrefill] = {}
        self._apart: set[Spot] = set()  # whose memory could not be mapped

    async def start(self) -> None:
        """Nothing to start: connections are opened when they are needed."""

    async def close(self) -> None:
        """See KvReceiver."""
        self.stop()
        for link in list(self._links.values()):
            await link.hang_up()
        self._links.clear()

    def on_tick(self) -> None:
        """Leases, beats and silence."""
        super().on_tick()
        for link in list(self._links.values()):
            if link.main:
                beats.look_after(link.main, self.loop.time())

    def link_to(self, address: PeerAddress) -> _ToPrefill:
        """See ReceiverEndpoint."""
        spot = (address.host, address.kv_port)
        if spot not in self._links:
            self._links[spot] = _ToPrefill(self, spot, self.identity.facing(address))
        return self._links[spot]

    def send(self, peer: _ToPrefill, message: Any) -> None:
        """See ReceiverEndpoint."""
        peer.send(message)

    def transports(self, spot: Spot) -> tuple[Transport, ...]:
        """What may be offered there."""
        lacking = set()
        if not self.probe.ref or spot in self._apart:
            lacking.add(Transport.SHARED_MEMORY)
        if self.fabric is None:
            lacking.add(Transport.DEVICE)
        return tuple(each for each in self.options.transports if each not in lacking)

    def set_apart(self, spot: Spot) -> None:
        """Shared memory turned out not to work: it is not offered there again."""
        self._apart.add(spot)

    def lost(self, link: _ToPrefill, error: errors.BatonError) -> None:
        """The session is gone, or never came to be: the next request opens another."""
        if self._links.get(link.spot) is link:
            del self._links[link.spot]
            self.apply(self.core.on_peer_lost(link, error))


class _ToPrefill:
    """One session; messages wait until the handshake is over."""

    def __init__(self, owner: NetKvReceiver, spot: Spot, identity: KvIdentity) -> None:
        self.spot = spot
        self.identity = identity  # ours, for the heads that it hands over
        self.main: KvConnection | None = None  # once welcome
        self.transport: Transport | None = None
        self._owner = owner
        self._early: list[Any] = []
        self._connections: list[KvConnection] = []
        self._session = b""
        self._is_over = False
        self._segments: OrderedDict[int, Segment] = OrderedDict()
        self._arena: Arena | None = None
        self._landing: dict[KvConnection, tuple[Segment, int]] = {}
        self._device: DevicePeer | None = None
        self._released = Returns(self._tell_released)
        self._tasks = {owner.loop.create_task(self._connect())}

    def send(self, message: Any) -> None:
        """Send, now or when the handshake is over."""
        if self.main:
            self.main.send(message)
        else:
            self._early.append(message)

    async def hang_up(self) -> None:
        """Close; nobody is told."""
        self._owner.core.on_peer_lost(self, TransferError("closing"))
        self._is_over = True
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._close(TransferError("closing"))

    # Connecting

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                connected = await _open_socket(*self.spot)
        except (OSError, TimeoutError) as error:
            reason = TransferError(f"cannot connect to {self.spot[0]}:{self.spot[1]}: {error}")
            self._owner.loop.call_soon(self._fail, reason)
            return
        if self._is_over:
            connected.close()
            return
        owner = self._owner
        window = max(owner.options.arena_bytes, self.identity.layout.block_bytes)
        offer = Offer(owner.transports(self.spot), owner.probe.ref, owner.options.encrypts, window, self._session)
        handshake = CallerHandshake(connected, self.identity, owner.secret, offer, self._on_welcome, self._fail)
        self._connections.append(handshake.connection)

    def _on_welcome(self, connection: KvConnection, welcome: KvWelcome) -> None:
        connection.events = self
        if self.main:
            return
        self.main, self.transport, self._session = connection, Transport(welcome.transport), welcome.session
        logger.info("KV from prefill worker %s travels by %s", welcome.worker_id, welcome.transport)
        for message in self._early:
            connection.send(message)
        self._early.clear()
        if self.transport is Transport.DEVICE:
            assert self._owner.fabric
            self._device = self._owner.fabric.connect(welcome.fabric)
        if self.transport is Transport.TCP:
            self._arena = Arena(int(self._owner.options.arena_bytes * ARENA_WINDOWS))
            for _ in range(self._owner.options.num_connections - 1):
                self._tasks.add(self._owner.loop.create_task(self._connect()))

    def _fail(self, error: Exception) -> None:
        """A connection was lost or never came to be, and with it the session."""
        if self._is_over:
            return
        self._is_over = True
        was_ready, self.main = self.main is not None, None
        self._close(error)
        if (was_ready and not isinstance(error, TransferError)) or not isinstance(error, errors.BatonError):
            error = TransferError(f"connection lost: {error}")  # another prefill worker may do better
        self._owner.lost(self, error)

    def _close(self, error: Exception) -> None:
        for connection in self._connections:
            connection.close(error)
        if self._device is not None:
            self._device.close()
        self._landing.clear()
        self._segments.clear()

    # ConnectionEvents

    def on_message(self, connection: KvConnection, message: Any) -> None:
        """From prefill."""
        if connection is not self.main:
            if not isinstance(message, KvBeat):
                raise ProtocolError(f"{type(message).__name__} on a connection for payload")
            return
        owner = self._owner
        match message:
            case KvBlocks(pull=number) if number:
                self._on_offered(message)
            case KvBlocks():
                self._on_shared(message)
            case KvSegment():
                self._on_segment(message)
            case KvBeat():
                pass
            case _ if hasattr(message, "serial"):
                owner.apply(owner.core.on_message(owner.loop.time(), message))
            case _:
                raise ProtocolError(f"{type(message).__name__} after the handshake")

    def on_header(self, connection: KvConnection, header: KvBlocks) -> np.ndarray | None:
        """Room for blocks that are wanted."""
        check_header(header, self.identity.layout)
        if self.transport is not Transport.TCP:
            raise ProtocolError("payload on a connection of shared memory")
        if not self._owner.core.wants(header):
            self._released.add(header.frame)
            return None
        memory, segment, offset = self._room_for(header)
        self._landing[connection] = (segment, offset)
        return memory

    def on_payload(self, connection: KvConnection, header: KvBlocks, payload: np.ndarray) -> None:
        """Blocks have arrived by socket."""
        segment, offset = self._landing.pop(connection)
        self._on_landed(header, payload, segment, offset, len(header.blocks) * self.identity.layout.layer_bytes)

    def on_room(self, connection: KvConnection) -> None:
        """Nothing waits."""

    def on_closed(self, connection: KvConnection, error: Exception) -> None:
        """One connection gone, all gone."""
        self._fail(error)

    # Payload

    def _on_landed(self, header: KvBlocks, memory: np.ndarray, segment: Segment, offset: int, stride: int) -> None:
        owner = self._owner
        n = len(header.blocks)
        rows = strided_rows(memory, n, stride, self.identity.layout)
        intact = owner.core.wants(header) and is_intact(header, owner.digester.reader(rows).digests(range(n)))
        effects = owner.core.on_blocks(owner.loop.time(), header, intact)
        owner.apply(effects, LandedBlocks(rows, segment, offset, stride))

    def _on_offered(self, header: KvBlocks) -> None:
        """Blocks wait on the sender's device. Those not wanted are pulled too: nothing else frees them there."""
        owner = self._owner
        check_header(header, owner.identity.layout)
        if self._device is None:
            raise ProtocolError("blocks to be pulled though no device was agreed on")
        late = TransferTimeout(f"blocks were not pulled within {PULL_S} s")
        deadline = owner.loop.call_later(PULL_S, self._fail, late)

        def on_done(result: Pulled | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                owner.loop.call_soon_threadsafe(self._on_pulled, header, deadline, result)

        self._device.pull(header.pull, len(header.blocks), owner.identity.layout, on_done)

    def _on_pulled(self, header: KvBlocks, deadline: asyncio.TimerHandle, result: Pulled | Exception) -> None:
        deadline.cancel()
        if self._is_over:
            return
        if isinstance(result, Exception):
            self._fail(TransferError(f"cannot pull blocks: {result}"))
            return
        owner, n = self._owner, len(header.blocks)
        intact = is_intact(header, result.digests)
        left = [len(result.layers)]
        for layer in result.layers:
            weakref.finalize(layer, self._let_go, left, header.frame).atexit = False
        rows = as_rows(result.layers, n, owner.identity.layout)
        effects = owner.core.on_blocks(owner.loop.time(), header, intact)
        owner.apply(effects, LandedBlocks(rows, None, 0, 0))

    def _let_go(self, left: list[int], frame: int) -> None:
        """On any thread: one of the frame's layers is no longer held."""
        left[0] -= 1
        if not left[0]:
            self._released.add(frame)

    def _on_segment(self, message: KvSegment) -> None:
        """Map memory of the prefill worker."""
        if self.transport is not Transport.SHARED_MEMORY:
            raise ProtocolError("a segment though memory is not shared")
        try:
            self._segments[message.segment] = Segment.open(message.ref)
        except OSError as error:
            self._owner.set_apart(self.spot)
            raise TransferError(f"cannot map the prefill worker's memory: {error}") from error
        if len(self._segments) > MAX_SEGMENTS:
            self._segments.popitem(last=False)

    def _on_shared(self, header: KvBlocks) -> None:
        """Blocks lie in shared memory."""
        layout, place = self.identity.layout, header.place
        check_header(header, layout)
        segment = self._segments.get(place.segment) if place else None
        if place is None or segment is None:
            raise ProtocolError("blocks in memory that is not mapped")
        num_bytes = strided_bytes(len(header.blocks), place.layer_stride, layout)
        memory = segment.lend(place.offset, num_bytes, lambda: self._released.add(header.frame))
        self._on_landed(header, memory, segment, place.offset, place.layer_stride)

    def _room_for(self, header: KvBlocks) -> tuple[np.ndarray, Segment, int]:
        """Memory for a payload; one that the arena has no unbroken room for gets a segment of its own."""
        assert self._arena
        free = lambda: self._released.add(header.frame)  # noqa: E731
        loan = self._arena.lend(header.num_bytes, free)
        if loan:
            return loan[1], self._arena.segment, loan[0]
        segment = Segment.create(header.num_bytes)
        return segment.lend(0, header.num_bytes, free), segment, 0

    def _tell_released(self, frames: tuple[int, ...]) -> None:
        if self.main:
            self.main.send(KvRelease(frames))


async def _open_socket(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setblocking(False)
        await loop.sock_connect(opened, address)
    except BaseException:
        opened.close()
        raise
    return opened
