"""KvSender that copies blocks into memory which a data-plane process maps."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_core.errors import BatonError, ProtocolError, TransferError
from engine_core.messages import Message, TokenChunk
from kv_transfer.arena import Arena
from kv_transfer.auth import check_bind
from kv_transfer.base import Layers, SenderEvents
from kv_transfer.blocks import as_rows, payload_rows
from kv_transfer.compiled.digester import open_digester
from kv_transfer.digester import STREAM_BYTES, Reader
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.plane_link import PlaneLink, PlaneProcess
from kv_transfer.plane_wire import (
    PlaneAbort,
    PlaneFinish,
    PlaneOffer,
    PlanePush,
    PlaneRefused,
    PlaneRetire,
    PlaneReturn,
    PlaneSegment,
    PlaneTicket,
    abort_of,
    error_of,
)
from kv_transfer.sender import FRAME_BYTES, MAX_FRAME_BYTES
from kv_transfer.wire import Place, Transport

MIN_LOANS = 4  # blocks that an arena has room for at the least
PIPELINE_FRAMES = 8  # in an arena at the least, so that all processes on the way work at once
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _Unstaged:
    """Blocks that found no room in shared memory: those from number `first` on; `streams`: see Reader."""

    key: Key
    indices: tuple[int, ...]
    reader: Reader
    first: int
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
        self._plane = PlaneLink(self, process)
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
        reader = self._digester.reader(as_rows(layers, len(indices), layout))
        to_socket = self._open.get((request_id, epoch)) is Transport.TCP  # which reads what was just written
        can_stream = not to_socket or self._digester.prefers_streams
        streams = can_stream and len(indices) * layout.block_bytes > STREAM_BYTES
        start = 0
        while start < len(indices):
            each = self._frame_blocks(start, len(indices) - start)
            blocks = _Unstaged((request_id, epoch), indices[start : start + each], reader, start, streams)
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

    def _frame_blocks(self, done: int, left: int) -> int:
        """Blocks of the next frame: half of as many as are left, or of twice those before.

        What a frame costs beside its bytes is paid less often if it is large; the first and the last are small, as
        nobody works beside who copies those or verifies these. No two are smaller than one that would do for both.
        """
        block_bytes = self._identity.layout.block_bytes
        least = FRAME_BYTES if not done or left * block_bytes > 2 * FRAME_BYTES else 2 * FRAME_BYTES
        most = min(MAX_FRAME_BYTES, max(FRAME_BYTES, self._arena_bytes // PIPELINE_FRAMES))
        return max(1, min(max(least, min(2 * done, left) * block_bytes // 2), most) // block_bytes)

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
        digests = blocks.reader.copy(blocks.first, payload_rows(memory, n, layout), streams=blocks.streams)
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
