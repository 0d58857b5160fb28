"""The data plane of one worker: `python -m kv_transfer.plane_process FD [FD]`, started by `kv_transfer.plane_link`.

Runs the endpoints, of a sender and a receiver, that talk to other hosts: checksums, sockets, shared memory of peers.
It ends when its worker does.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from engine_core.errors import BatonError, ConfigError, ProtocolError
from engine_core.messages import TokenChunk
from kv_transfer.arena import Segment, SegmentRef
from kv_transfer.base import Layers
from kv_transfer.blocks import HostBlocks, LandedBlocks, strided_bytes, strided_rows
from kv_transfer.channel import Channel
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
    to_plane,
)
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.returns import Returns
from kv_transfer.sender import NetKvSender
from kv_transfer.ticket import Ticket
from kv_transfer.wire import KvBlocks, Place, Transport

MAX_SEGMENTS = 4  # of the worker, newest first
MAX_INFLIGHT_BYTES = 1 << 62  # the worker bounds what it hands over


async def serve_all(connected: list[socket.socket]) -> None:
    """Be all of a worker's endpoints until it hangs up."""
    await asyncio.gather(*map(serve, connected))


async def serve(connected: socket.socket) -> None:
    """Be the endpoint of the worker at the other end of `connected` until it hangs up."""
    over = asyncio.Event()

    def on_start(channel: Channel, message: Any) -> None:
        if not isinstance(message, PlaneStart):
            raise ProtocolError(f"{type(message).__name__} before PlaneStart")
        planes.append(_PrefillPlane(channel, message) if message.host else _DecodePlane(channel, message))

    planes: list[_PrefillPlane | _DecodePlane] = []
    loop = asyncio.get_running_loop()
    make = lambda: Channel(to_plane, lambda channel: None, on_start, lambda channel, error: over.set())  # noqa: E731
    await loop.create_connection(make, sock=connected)
    await over.wait()
    for plane in planes:
        await plane.close()


class _PrefillPlane:
    """SenderEvents of the endpoint on one side, the worker on the other."""

    def __init__(self, channel: Channel, start: PlaneStart) -> None:
        self._channel = channel
        self._identity, self._options = _identity(start), _options(start)
        self._segments: dict[int, Segment] = {}
        self._newest = 0
        self._returns = Returns(lambda loans: channel.send(PlaneReturn(loans)))
        self._sender = NetKvSender(self._identity, start.secret, self, MAX_INFLIGHT_BYTES, self._options)
        self._sender.worker_memory = self
        self._sender.on_refused = self._on_refused
        self._starting = asyncio.get_running_loop().create_task(self._start(start))
        channel.on_message = self._on_message

    async def _start(self, start: PlaneStart) -> None:
        try:
            port = await self._sender.start(start.host, start.port)
        except ConfigError as error:
            self._channel.send(PlaneReady(0, str(error)))
            return
        self._channel.send(PlaneReady(port, ""))

    async def close(self) -> None:
        """The worker is gone."""
        await self._starting
        await self._sender.close()

    # SharedMemory

    def ref(self, number: int) -> SegmentRef:
        """The worker's memory."""
        ref = self._segments[number].ref
        assert ref
        return ref

    def retire(self) -> None:
        """The worker writes there no more; it learns so before it learns of any memory that is free again."""
        self._channel.send(PlaneRetire(self._newest))

    # SenderEvents

    def on_ticket(self, ticket: Ticket) -> None:
        """Pass on."""
        self._channel.send(PlaneTicket(ticket, None, self._sender.transport_of(ticket.key)))

    def on_cancel(self, request_id: str, epoch: int, error: BatonError) -> None:
        """Pass on."""
        self._channel.send(abort_of(request_id, epoch, error))

    def _on_refused(self, code: str) -> None:
        self._channel.send(PlaneRefused(code))

    def _on_message(self, channel: Channel, message: Any) -> None:
        match message:
            case PlaneOffer(request_id, epoch, lease_s):
                self._sender.offer(request_id, epoch, lease_s)
            case PlanePush():
                self._push(message)
            case PlaneFinish(request_id, epoch, first_token):
                self._sender.finish(request_id, epoch, first_token)
            case PlaneAbort(request_id, epoch):
                self._sender.abort(request_id, epoch, error_of(message))
            case PlaneSegment(number, ref):
                self._newest = number
                kept = list(self._segments.items())[: MAX_SEGMENTS - 1]
                self._segments = {number: Segment.open(ref), **dict(kept)}
            case _:
                raise ProtocolError(f"{type(message).__name__} from a prefill worker")

    def _push(self, message: PlanePush) -> None:
        place, layout, n = message.place, self._identity.layout, len(message.indices)
        num_bytes = strided_bytes(n, place.layer_stride, layout)
        loan = message.loan
        memory = self._segments[place.segment].lend(place.offset, num_bytes, lambda: self._returns.add(loan))
        rows = strided_rows(memory, n, place.layer_stride, layout)
        self._sender.send_host_blocks(
            message.request_id, message.epoch, message.indices, HostBlocks(rows, place, message.digests)
        )


class _DecodePlane:
    """ReceiverEvents of the endpoint on one side, the worker on the other."""

    def __init__(self, channel: Channel, start: PlaneStart) -> None:
        self._channel = channel
        self._loans: dict[int, LandedBlocks] = {}
        self._numbers = itertools.count(1)
        self._segments: dict[bytes, int] = {}  # by token
        self._forgotten = Returns(self._forget)
        self._receiver = _Receiver(_identity(start), start.secret, self, _options(start))
        self._receiver.on_landed = self._on_landed
        channel.on_message = self._on_message
        channel.send(PlaneReady(0, ""))

    async def close(self) -> None:
        """The worker is gone."""
        await self._receiver.close()

    # ReceiverEvents

    def on_blocks(
        self, request_id: str, epoch: int, block_indices: Sequence[int], layers: Layers, generations: Sequence[int]
    ) -> None:
        """See `_on_landed`."""
        raise AssertionError("blocks are passed on with their place")

    def on_done(self, request_id: str, epoch: int, first_token: TokenChunk, lost: Sequence[int]) -> None:
        """Pass on."""
        self._channel.send(PlaneDone(request_id, epoch, first_token, tuple(lost)))

    def on_failed(self, request_id: str, epoch: int, error: BatonError) -> None:
        """Pass on."""
        self._channel.send(abort_of(request_id, epoch, error))

    def _on_landed(self, header: KvBlocks, landed: LandedBlocks) -> None:
        assert landed.segment and landed.segment.ref
        ref = landed.segment.ref
        if ref.token not in self._segments:
            number = self._segments[ref.token] = next(self._numbers)
            self._channel.send(PlaneSegment(number, ref))
            weakref.finalize(landed.segment, self._forgotten.add, number).atexit = False
        place = Place(self._segments[ref.token], landed.offset, landed.layer_stride)
        loan = next(self._numbers)
        self._loans[loan] = landed
        self._channel.send(PlaneBlocks(header.request_id, header.epoch, header.blocks, header.generations, place, loan))

    def _forget(self, numbers: tuple[int, ...]) -> None:
        self._segments = {token: number for token, number in self._segments.items() if number not in numbers}
        self._channel.send(PlaneForget(numbers))

    def _on_message(self, channel: Channel, message: Any) -> None:
        match message:
            case PlaneTicket(ticket, address) if address:
                self._receiver.request(address, ticket)
            case PlaneCancel(request_id, epoch):
                self._receiver.cancel(request_id, epoch)
            case PlaneReturn(loans):
                for loan in loans:
                    del self._loans[loan]
            case _:
                raise ProtocolError(f"{type(message).__name__} from a decode worker")


class _Receiver(NetKvReceiver):
    """Passes blocks on with their place, as no other process could map mere arrays."""

    on_landed: Callable[[KvBlocks, LandedBlocks], None]

    def deliver(self, header: KvBlocks, landed: LandedBlocks) -> None:
        """See ReceiverEndpoint."""
        self.on_landed(header, landed)


def _identity(start: PlaneStart) -> KvIdentity:
    return KvIdentity(
        worker_id=start.worker_id,
        incarnation=start.incarnation,
        fingerprint=start.fingerprint,
        layout=BlockLayout(**start.layout),
    )


def _options(start: PlaneStart) -> TransferOptions:
    return TransferOptions(
        transports=tuple(Transport(each) for each in start.transports),
        num_connections=start.num_connections,
        arena_bytes=start.arena_bytes,
        encrypts=start.encrypts,
        library=Path(start.library) if start.library else None,
    )


def main() -> None:
    """Entry point of the process. It outlives signals to its process group, as its worker drains on them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uvloop.run(serve_all([socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:]]))


if __name__ == "__main__":
    main()
