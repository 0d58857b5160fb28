"""The prefill worker's end of the hand-off: listens for decode workers, pushes to each over what both can do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engine_core.errors import BatonError, ConfigError, ProtocolError, TransferError
from kv_transfer import beats, handoff
from kv_transfer.arena import Arena, SegmentRef
from kv_transfer.auth import check_bind
from kv_transfer.base import SenderEvents
from kv_transfer.blocks import HostBlocks, as_layers, block_header, first_run, named, payload_rows
from kv_transfer.compiled.digester import open_digester
from kv_transfer.connection import ROOM_BYTES, KvConnection
from kv_transfer.digester import STREAM_BYTES
from kv_transfer.endpoint import KvIdentity, SenderEndpoint
from kv_transfer.fabric import DeviceFabric
from kv_transfer.handoff import Key
from kv_transfer.handshake import ListenerHandshake, TransferOptions, choose
from kv_transfer.layout import BlockLayout
from kv_transfer.repaging import check_convertible
from kv_transfer.wire import KvBeat, KvBlocks, KvHello, KvRelease, KvSegment, Place, Transport

logger = logging.getLogger(__name__)

FRAME_BYTES = 4 << 20  # payload of one frame, unless a single block is larger, or a worker's plane hands over more
MAX_FRAME_BYTES = 32 << 20
WINDOW_FRAMES = 12  # in a decode worker's window at the least, so that its arena has unbroken room for each
TURN_FRAMES = 2  # copied to shared memory per turn of the event loop at most
SESSION_BYTES = 16
MAX_CONNECTIONS = 64  # of one session


class NetKvSender(SenderEndpoint):
    """KvSender for decode workers of this and other hosts."""

    healthy = True
    """It has no process of its own that could end."""

    def __init__(
        self,
        identity: KvIdentity,
        secret: bytes | None,
        events: SenderEvents,
        max_inflight_bytes: int,
        options: TransferOptions,
        fabric: DeviceFabric | None = None,
    ) -> None:
        super().__init__(identity, events, max_inflight_bytes)
        self.fabric = fabric
        self.secret = secret
        self.own_memory = OwnMemory(options.arena_bytes)
        self.worker_memory: SharedMemory | None = None
        self.digester = open_digester(options.library)
        self._options = options
        self._sessions: dict[bytes, _ToDecode] = {}
        self._waiting: set[ListenerHandshake] = set()
        self.on_refused: Callable[[str], None] = lambda code: None
        """Told the error's code of each connection that was ended for what it said."""
        self._listener: socket.socket | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; port 0 takes any free one. Returns the port."""
        check_bind(host, self.secret)
        self._options.check_secret(self.secret)
        try:
            found = await self.loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self._listener = socket.create_server(found[0][4][:2], family=found[0][0], backlog=128)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
        self._listener.setblocking(False)
        self.loop.add_reader(self._listener, self._accept)
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        """See KvSender."""
        self.stop()
        if self._listener is not None:
            self.loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for handshake in list(self._waiting):
            handshake.connection.close(TransferError("closing"))
        for link in list(self._sessions.values()):
            link.close(TransferError("closing"))
        await asyncio.sleep(0)

    def on_tick(self) -> None:
        """Leases, beats and silence."""
        super().on_tick()
        for link in list(self._sessions.values()):
            beats.look_after(link.main, self.loop.time())

    def segment_ref(self, number: int) -> SegmentRef:
        """Of memory that a place names."""
        if number < 0 or self.worker_memory is None:
            return self.own_memory.ref(number)
        return self.worker_memory.ref(number)

    def retire_memory(self) -> None:
        """A reader was lost that may still read what we share."""
        self.own_memory.retire()
        if self.worker_memory is not None:
            self.worker_memory.retire()

    def transport_of(self, key: Key) -> Transport | None:
        """How an open hand-off travels; None while nobody has asked for it."""
        link = self.core.peer(key)
        return link.transport if isinstance(link, _ToDecode) else None

    def fill_all(self) -> None:
        """There is room in the arena: send what waited for it."""
        for link in list(self._sessions.values()):
            link.fill()

    def lost(self, link: _ToDecode, error: Exception) -> None:
        """The session is gone."""
        if self._sessions.pop(link.session, None) is None:
            return
        self.links.discard(link)
        if isinstance(error, ProtocolError):
            self.on_refused(error.code)
        logger.info("KV connection to decode worker %s ended: %s", link.worker_id, error)
        self.apply(self.core.on_peer_lost(self.loop.time(), link))

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            self._waiting.add(
                ListenerHandshake(
                    accepted, self.identity, self.secret, self._options.encrypts, self._admit, self._on_over
                )
            )

    def _on_over(self, handshake: ListenerHandshake, refusal: BatonError | None) -> None:
        self._waiting.discard(handshake)
        if refusal is not None:
            self.on_refused(refusal.code)

    def _admit(self, connection: KvConnection, hello: KvHello) -> tuple[Transport, bytes, str]:
        if hello.session:
            link = self._sessions.get(hello.session)
            if link is None or link.worker_id != hello.worker_id or link.transport is not Transport.TCP:
                raise ProtocolError("no such session")
            link.join(connection)
            return link.transport, link.session, ""
        check_convertible(self.identity.layout, BlockLayout.from_wire(hello.layout))
        transport = choose(hello, self._transports(hello))
        link = _ToDecode(self, connection, hello, transport)
        self._sessions[link.session] = link
        self.links.add(link)
        logger.info("KV to decode worker %s travels by %s", hello.worker_id, transport)
        fabric = self.fabric.address if self.fabric and transport is Transport.DEVICE else ""
        return transport, link.session, fabric

    def _transports(self, hello: KvHello) -> tuple[Transport, ...]:
        """Device to device: only blocks of the same shape and dtype, and only in the clear."""
        is_sealed = hello.encrypts or self._options.encrypts
        if self.fabric and not is_sealed and hello.layout == self.identity.layout.wire_fields:
            return self._options.transports
        return tuple(each for each in self._options.transports if each is not Transport.DEVICE)


class SharedMemory(Protocol):
    """Memory of the worker itself, where its blocks lie already."""

    def ref(self, number: int) -> SegmentRef:
        """Of the segment that a place names."""
        ...

    def retire(self) -> None:
        """A reader was lost that may still read."""
        ...


class OwnMemory:
    """One arena, until a reader is lost that may still read.

    A reader that was given up may run on, frozen or cut off for a while. What it maps is never written again: the
    arena is retired, and the next blocks go to a new one.
    """

    def __init__(self, num_bytes: int) -> None:
        self.number = 0  # of the arena; negative: those of the worker's memory are positive
        self.num_bytes = num_bytes
        self._arena: Arena | None = None

    @property
    def arena(self) -> Arena:
        """The one in use."""
        if self._arena is None:
            self._arena = Arena(self.num_bytes)
            self.number -= 1
        return self._arena

    def ref(self, number: int) -> SegmentRef:
        """See SharedMemory."""
        ref = self.arena.segment.ref
        assert ref and number == self.number
        return ref

    def retire(self) -> None:
        """See SharedMemory."""
        self._arena = None


@dataclass(frozen=True, slots=True)
class _Frame:
    """Sent, and not released yet.

    Attributes:
        memory: what the receiver reads in place; kept for it.
    """

    key: Key
    shipment: int
    blocks: tuple[int, ...]
    num_bytes: int
    memory: Any


class _ToDecode:
    """One session: a queue of effects, turned into frames only as fast as they leave and as decode grants."""

    def __init__(self, owner: NetKvSender, main: KvConnection, hello: KvHello, transport: Transport) -> None:
        self.worker_id = hello.worker_id
        own = owner.identity.layout
        self.layout = BlockLayout.from_wire(hello.layout).part(own.first_kv_head, own.num_kv_heads)
        self.transport = transport
        self.session = secrets.token_bytes(SESSION_BYTES)
        self.main = main
        self._owner = owner
        self._connections = [main]
        self._window_bytes = hello.window_bytes
        self._outbox: deque[handoff.Send | handoff.SendBlocks] = deque()
        self._frames: dict[int, _Frame] = {}
        self._out_bytes = 0
        self._next_frame = 0
        self._known_segment = 0
        self._filling = False
        main.events = self

    def join(self, connection: KvConnection) -> None:
        """One more connection for payload."""
        if len(self._connections) >= MAX_CONNECTIONS:
            raise ProtocolError(f"more than {MAX_CONNECTIONS} connections")
        connection.events = self
        self._connections.append(connection)

    def close(self, error: Exception) -> None:
        """Close every connection."""
        for connection in self._connections:
            connection.close(error)

    # OutLink

    def put(self, item: handoff.Send | handoff.SendBlocks) -> None:
        """Send behind all that was put before."""
        if not self.main.closed:
            self._outbox.append(item)
            self.fill()

    def unsend(self, key: Key) -> None:
        """Drop what has not begun to leave."""
        self._outbox = deque(item for item in self._outbox if item.key != key)

    # ConnectionEvents

    def on_message(self, connection: KvConnection, message: Any) -> None:
        """From decode."""
        if connection is not self.main and not isinstance(message, KvBeat):
            raise ProtocolError(f"{type(message).__name__} on a connection for payload")
        if isinstance(message, KvHello):
            raise ProtocolError("a second KvHello")
        if isinstance(message, KvRelease):
            self._on_release(message)
        elif not isinstance(message, KvBeat):
            self._owner.apply(self._owner.core.on_message(self._owner.loop.time(), self, message))

    def on_header(self, connection: KvConnection, header: KvBlocks) -> np.ndarray | None:
        """Never."""
        raise ProtocolError("a decode worker sent blocks")

    def on_payload(self, connection: KvConnection, header: KvBlocks, payload: np.ndarray) -> None:
        """Never."""

    def on_room(self, connection: KvConnection) -> None:
        """A socket takes more."""
        self.fill()

    def on_closed(self, connection: KvConnection, error: Exception) -> None:
        """One connection gone, all gone."""
        self.close(error)
        self._outbox.clear()
        if self._frames and self.transport is Transport.SHARED_MEMORY:
            self._owner.retire_memory()
        if self._owner.fabric and self.transport is Transport.DEVICE:
            self._owner.fabric.withdraw([frame.memory for frame in self._frames.values()])
        self._frames.clear()
        self._owner.lost(self, error)

    def _on_release(self, message: KvRelease) -> None:
        core, now = self._owner.core, self._owner.loop.time()
        for number in message.frames:
            frame = self._frames.pop(number, None)
            if frame is None:
                raise ProtocolError(f"frame {number} is released but was not sent")
            self._out_bytes -= frame.num_bytes
            if self._owner.fabric and self.transport is Transport.DEVICE:
                self._owner.fabric.pulled([frame.memory])
            core.on_released(now, frame.key, frame.shipment, frame.blocks)
        self._owner.account()
        self.fill()

    # Frames

    def fill(self) -> None:
        """Send what may leave now."""
        if self._filling:
            return
        self._filling = True
        try:
            budget = TURN_FRAMES
            while self._outbox and not self.main.closed:
                item = self._outbox[0]
                if isinstance(item, handoff.Send):
                    self._outbox.popleft()
                    self.main.send(item.message)
                elif not budget:
                    self._owner.loop.call_soon(self.fill)
                    return
                elif self._send_frame(item):
                    budget -= self.transport is Transport.SHARED_MEMORY
                else:
                    return
        finally:
            self._filling = False

    def _send_frame(self, item: handoff.SendBlocks) -> bool:
        """Send the first frame's worth of `item` and leave the rest in front; False while there is no room."""
        n = max(1, self._frame_limit(item.source) // self.layout.block_bytes)
        ways = {Transport.SHARED_MEMORY: self._share, Transport.TCP: self._stream, Transport.DEVICE: self._offer}
        n = ways[self.transport](item, n)
        if not n:
            return False
        self._outbox.popleft()
        if n < len(item.blocks):
            rest = handoff.SendBlocks(
                item.peer, item.ticket, item.blocks[n:], item.source, item.places[n:], item.shipment
            )
            self._outbox.appendleft(rest)
        return True

    def _frame_limit(self, source: HostBlocks) -> int:
        """Bytes of a frame at most: as the worker's end has cut them, where it has."""
        if source.place is None:
            return FRAME_BYTES
        if self.transport is Transport.SHARED_MEMORY:
            return MAX_FRAME_BYTES
        return min(MAX_FRAME_BYTES, max(FRAME_BYTES, self._window_bytes // WINDOW_FRAMES))

    def _stream(self, item: handoff.SendBlocks, n: int) -> int:
        """Put the next n blocks on a socket; how many, 0 while there is no room."""
        layout = self.layout
        source: HostBlocks = item.source
        blocks, places = item.blocks[:n], item.places[:n]
        num_bytes = len(blocks) * layout.block_bytes
        connection = min(self._connections, key=lambda each: each.queued_bytes)
        if connection.queued_bytes >= ROOM_BYTES or not self._is_granted(num_bytes):
            return 0
        sums = source.checksums(places, item.key, blocks, self._owner.digester)
        header = block_header(item.ticket, blocks, sums, layout, self._note(item, blocks, num_bytes, None), None)
        connection.send(header, _pieces(source, places))
        return len(blocks)

    def _offer(self, item: handoff.SendBlocks, n: int) -> int:
        """Let the next n blocks be pulled from the device; how many, 0 while decode has no room."""
        source: HostBlocks = item.source
        blocks, places = item.blocks[:n], list(item.places[:n])
        num_bytes = len(blocks) * self.layout.block_bytes
        if not self._is_granted(num_bytes):
            return 0
        assert self._owner.fabric
        number, digests = self._owner.fabric.offer(as_layers([row[places] for row in source.rows], self.layout))
        sums = named(digests, item.key, blocks)
        frame = self._note(item, blocks, num_bytes, number)
        self.main.send(block_header(item.ticket, blocks, sums, self.layout, frame, None, number))
        return len(blocks)

    def _share(self, item: handoff.SendBlocks, n: int) -> int:
        """Let the next blocks be read in shared memory; how many, 0 while there is no room."""
        layout = self.layout
        source: HostBlocks = item.source
        run = first_run(item.places, n)
        blocks = item.blocks[: len(run)]
        num_bytes = len(run) * layout.block_bytes
        if source.place is not None:
            return self._share_in_place(item, run, source.place)
        shared = self._owner.own_memory
        loan = shared.arena.lend(num_bytes, self._on_arena_room)
        if loan is None:
            if not shared.arena.lent_bytes:
                self.close(ProtocolError(f"a block of {layout.block_bytes} bytes is larger than the shared memory"))
            return 0
        offset, memory = loan
        reader, targets = self._owner.digester.reader(source.rows), payload_rows(memory, len(run), layout)
        streams = len(item.blocks) * layout.block_bytes > STREAM_BYTES
        digests = reader.copy(run.start, targets, streams=streams)
        sums = named(digests, item.key, blocks)
        place = Place(shared.number, offset, len(run) * layout.layer_bytes)
        self._send_place(item, blocks, sums, place, memory)
        return len(run)

    def _share_in_place(self, item: handoff.SendBlocks, run: range, place: Place) -> int:
        """The blocks lie in shared memory already."""
        layout, source = self.layout, item.source
        blocks = item.blocks[: len(run)]
        sums = source.checksums(run, item.key, blocks, self._owner.digester)
        offset = place.offset + run.start * layout.layer_bytes
        self._send_place(item, blocks, sums, Place(place.segment, offset, place.layer_stride), source)
        return len(run)

    def _send_place(
        self,
        item: handoff.SendBlocks,
        blocks: tuple[tuple[int, int], ...],
        sums: tuple[int, ...],
        place: Place,
        memory: Any,
    ) -> None:
        layout = self.layout
        if self._known_segment != place.segment:
            self._known_segment = place.segment
            self.main.send(KvSegment(place.segment, self._owner.segment_ref(place.segment)))
        number = self._note(item, blocks, len(blocks) * layout.block_bytes, memory)
        self.main.send(block_header(item.ticket, blocks, sums, layout, number, place))

    def _is_granted(self, num_bytes: int) -> bool:
        """Whether decode has room; a single frame larger than its window may go alone."""
        return not self._frames or self._out_bytes + num_bytes <= self._window_bytes

    def _note(self, item: handoff.SendBlocks, blocks: tuple[tuple[int, int], ...], num_bytes: int, memory: Any) -> int:
        number = self._next_frame
        self._next_frame += 1
        indices = tuple(index for index, _ in blocks)
        self._frames[number] = _Frame(item.key, item.shipment, indices, num_bytes, memory)
        self._out_bytes += num_bytes
        return number

    def _on_arena_room(self) -> None:
        """On any thread. Another session may have been waiting."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._owner.loop.call_soon_threadsafe(self._owner.fill_all)


def _pieces(source: HostBlocks, places: tuple[int, ...]) -> list[memoryview]:
    """The bytes at `places`, layer-major, in as few pieces as they allow."""
    run = first_run(places, len(places))
    if isinstance(source.rows, np.ndarray) and len(run) == source.rows.shape[1] and source.rows.flags.c_contiguous:
        return [source.rows.reshape(-1).data]
    if len(run) == len(places):
        return [row[run.start : run.stop].reshape(-1).data for row in source.rows]
    return [row[place].data for row in source.rows for place in places]
