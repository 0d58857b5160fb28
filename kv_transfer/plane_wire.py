"""Messages between a worker and its data plane, a process of its own on the same host.

Frames are those of `kv_transfer.channel`, on a socket pair that the worker made. KV bytes lie in segments that both
map; a message names them by a `Place`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine_core.errors import BatonError
from engine_core.messages import Message, PeerAddress, TokenChunk
from kv_transfer.arena import SegmentRef
from kv_transfer.handoff import error_named
from kv_transfer.ticket import Ticket
from kv_transfer.wire import Place, Transport


class PlaneStart(Message, frozen=True):
    """Worker -> plane, first of all: who the worker is.

    Attributes:
        layout: fields of the BlockLayout.
        host: where to listen for decode workers; empty: the worker is one and listens nowhere.
        transports, num_connections, arena_bytes, encrypts, library: see TransferOptions; library: empty for none.
    """

    worker_id: str
    incarnation: int
    fingerprint: str
    layout: dict[str, Any]
    secret: bytes | None
    host: str
    port: int
    transports: tuple[str, ...]
    num_connections: int
    arena_bytes: int
    encrypts: bool
    library: str


class PlaneReady(Message, frozen=True):
    """Plane -> worker: where it listens, or why it cannot."""

    port: int
    problem: str


class PlaneSegment(Message, frozen=True):
    """Either way: memory that a `Place` may name from now on."""

    segment: int
    ref: SegmentRef


# Prefill


class PlaneOffer(Message, frozen=True):
    """Worker -> plane: `KvSender.offer`."""

    request_id: str
    epoch: int
    lease_s: float


class PlanePush(Message, frozen=True):
    """Worker -> plane: `KvSender.send_blocks`; the worker keeps the memory until loan number `loan` is returned.

    Attributes:
        digests: one per block, see `kv_transfer.blocks`.
    """

    request_id: str
    epoch: int
    indices: tuple[int, ...]
    digests: tuple[int, ...]
    place: Place
    loan: int


class PlaneFinish(Message, frozen=True):
    """Worker -> plane: `KvSender.finish`."""

    request_id: str
    epoch: int
    first_token: TokenChunk


class PlaneAbort(Message, frozen=True):
    """Prefill worker -> plane: `abort`. Plane -> worker: `on_cancel` or `on_failed`."""

    request_id: str
    epoch: int
    code: str
    message: str
    retryable: bool


class PlaneTicket(Message, frozen=True):
    """Plane -> prefill worker: `on_ticket`. Decode worker -> plane: `request`.

    Attributes:
        address: of the prefill worker, to the plane.
        transport: how blocks will travel, from the plane.
    """

    ticket: Ticket
    address: PeerAddress | None
    transport: Transport | None


class PlaneReturn(Message, frozen=True):
    """Either way: nobody needs the memory of these loans any more."""

    loans: tuple[int, ...]


class PlaneRetire(Message, frozen=True):
    """Plane -> prefill worker: somebody who was given up may still read segment `segment`: write there no more."""

    segment: int


class PlaneRefused(Message, frozen=True):
    """Plane -> prefill worker: a connection was ended for what it said; the error's code."""

    code: str


# Decode


class PlaneCancel(Message, frozen=True):
    """Worker -> plane: `KvReceiver.cancel`."""

    request_id: str
    epoch: int


class PlaneBlocks(Message, frozen=True):
    """Plane -> worker: `on_blocks`; the plane keeps the memory until loan number `loan` is returned."""

    request_id: str
    epoch: int
    indices: tuple[int, ...]
    generations: tuple[int, ...]
    place: Place
    loan: int


class PlaneForget(Message, frozen=True):
    """Plane -> decode worker: these segments will not be named again."""

    segments: tuple[int, ...]


class PlaneDone(Message, frozen=True):
    """Plane -> worker: `on_done`."""

    request_id: str
    epoch: int
    first_token: TokenChunk
    lost: tuple[int, ...]


ToPlane = (
    PlaneStart
    | PlaneSegment
    | PlaneOffer
    | PlanePush
    | PlaneFinish
    | PlaneAbort
    | PlaneTicket
    | PlaneReturn
    | PlaneCancel
)
ToWorker = (
    PlaneReady
    | PlaneSegment
    | PlaneTicket
    | PlaneAbort
    | PlaneReturn
    | PlaneRetire
    | PlaneRefused
    | PlaneBlocks
    | PlaneForget
    | PlaneDone
)

to_plane: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToPlane)
to_worker: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToWorker)


def abort_of(request_id: str, epoch: int, error: BatonError) -> PlaneAbort:
    """An error in words."""
    return PlaneAbort(request_id, epoch, error.code, str(error), error.retryable)


def error_of(message: PlaneAbort) -> BatonError:
    """The error again."""
    return error_named(message.code, message.message, message.retryable)
