"""KvReceiver that reads blocks where a data-plane process, or the peer itself, has put them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

from engine_core.errors import ProtocolError, TransferError
from engine_core.messages import PeerAddress
from kv_transfer.arena import Segment
from kv_transfer.base import ReceiverEvents
from kv_transfer.blocks import as_layers, strided_bytes, strided_rows
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.layout import BlockLayout
from kv_transfer.plane_link import PlaneLink, PlaneProcess
from kv_transfer.plane_wire import (
    PlaneAbort,
    PlaneBlocks,
    PlaneCancel,
    PlaneDone,
    PlaneForget,
    PlaneReturn,
    PlaneSegment,
    PlaneTicket,
    error_of,
)
from kv_transfer.returns import Returns
from kv_transfer.ticket import Ticket

Key = tuple[str, int]


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
        self._plane = PlaneLink(self, process)
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
