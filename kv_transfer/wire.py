"""Messages between a decode worker and the prefill workers it fetches KV from, and their bytes.

A frame (`framing`) holds one message in msgpack. Behind a `KvBlocks` without a `place` follow `num_bytes` of payload,
layer-major: `[L][n][page_size][2K][H]`; with one, the payload lies in memory that the sender shares. No frame carries
an address of the receiver: blocks are named by (request_id, epoch, block_index, generation), and each block's checksum
covers that name. The ticket's serial is there because a page's generation alone does not
name the page: after a request moved, the same block may wait in another page of the same generation (the simulator
found it).

A decode worker opens one connection, whose handshake chooses the transport, and may join more of them to the same
session; messages travel on the first, payload on any.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from engine_core.errors import ProtocolError
from engine_core.messages import Challenge, Refused, TokenChunk
from kv_transfer.arena import SegmentRef
from kv_transfer.layout import BlockLayout
from kv_transfer.ticket import Ticket

KV_PROTOCOL = 5
MAX_HEADER_BYTES = 4 << 20


class Transport(enum.StrEnum):
    """How payload travels."""

    SHARED_MEMORY = "shared_memory"
    TCP = "tcp"
    DEVICE = "device"


HOST_TRANSPORTS = (Transport.SHARED_MEMORY, Transport.TCP)
"""Those that need no device."""


class KvMessage(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base: on the wire an array whose first item is the class name."""


class KvHello(KvMessage, frozen=True):
    """First message of a decode worker. (worker_id, incarnation) is one life.

    Attributes:
        layout: of its blocks, in which it wants them: layers, page size, KV heads, head size, dtype.
        transports: what it can do, best first.
        probe: a segment that the prefill worker can open if both may share memory.
        encrypts: whether it wants frames to be sealed after the handshake.
        window_bytes: payload that may be on the way to it at any time.
        session: empty, or of an earlier connection that this one shall join.
    """

    protocol: int
    worker_id: str
    incarnation: int
    fingerprint: str
    secret_proof: bytes
    nonce: bytes
    layout: tuple[int, int, int, int, str]
    transports: tuple[str, ...]
    probe: SegmentRef | None
    encrypts: bool
    window_bytes: int
    session: bytes


class KvWelcome(KvMessage, frozen=True):
    """The prefill worker's answer.

    Attributes:
        transport: the one chosen.
        encrypts: whether all that follows is sealed, on both ways; so if either end wants it.
        session: names this connection and those that join it; random.
        fabric: where arrays are pulled from, if the transport is that from device to device.
    """

    protocol: int
    worker_id: str
    incarnation: int
    fingerprint: str
    secret_proof: bytes
    transport: str
    encrypts: bool
    session: bytes
    fabric: str = ""


class TicketMsg(KvMessage, frozen=True):
    """Decode -> prefill: push me these blocks."""

    ticket: Ticket


class TicketCancel(KvMessage, frozen=True):
    """Decode -> prefill: no longer wanted."""

    request_id: str
    epoch: int


class KvWant(KvMessage, frozen=True):
    """Decode -> prefill: send these blocks of ticket `serial` once more, they were damaged or lost on the way."""

    request_id: str
    epoch: int
    serial: int
    blocks: tuple[int, ...]


class KvRelease(KvMessage, frozen=True):
    """Decode -> prefill: the payload of these frames is no longer needed, its memory is free; also the credit."""

    frames: tuple[int, ...]


class KvSegment(KvMessage, frozen=True):
    """Prefill -> decode: memory that `Place.segment` may name from now on."""

    segment: int
    ref: SegmentRef


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where in shared memory the payload lies: layer i at `offset + i * layer_stride`, its n blocks side by side."""

    segment: int
    offset: int
    layer_stride: int


class KvBlocks(KvMessage, frozen=True):
    """Prefill -> decode: n blocks; their payload follows, or lies at `place`, or is to be pulled.

    Attributes:
        frame: number of this frame in its session, to be released.
        layers: range of layers, heads: range of KV heads; a sender always sends all layers, and all heads of its host.
        checksums: one per block, see `kv_transfer.blocks`.
        pull: number under which arrays of the layout's shape and dtype are registered; 0: none.
    """

    request_id: str
    epoch: int
    serial: int
    frame: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    layers: tuple[int, int]
    heads: tuple[int, int]
    dtype: str
    checksums: tuple[int, ...]
    num_bytes: int
    place: Place | None
    pull: int = 0

    @property
    def brings_payload(self) -> bool:
        """Whether it follows on the connection."""
        return self.place is None and not self.pull


class KvDone(KvMessage, frozen=True):
    """Prefill -> decode: all blocks of ticket `serial` but those of `lost` have been sent."""

    request_id: str
    epoch: int
    serial: int
    first_token: TokenChunk
    lost: tuple[int, ...] = ()


class KvAbort(KvMessage, frozen=True):
    """Prefill -> decode: ticket `serial` will not be served. `code` is from `engine_core.errors`."""

    request_id: str
    epoch: int
    serial: int
    code: str
    message: str
    retryable: bool


class KvBeat(KvMessage, frozen=True):
    """Either way, when nothing else was said for a while: this process still runs."""


FromDecode = KvHello | TicketMsg | TicketCancel | KvWant | KvRelease | KvBeat
FromPrefill = Challenge | Refused | KvWelcome | KvSegment | KvBlocks | KvDone | KvAbort | KvBeat

from_decode: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromDecode)
from_prefill: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromPrefill)
_ENCODER = msgspec.msgpack.Encoder()


def encode_body(message: msgspec.Struct) -> bytes:
    """The msgpack of a message."""
    return _ENCODER.encode(message)


def check_header(header: KvBlocks, layout: BlockLayout) -> None:
    """Refuse a header that contradicts itself or the layout, before a byte of payload is read for it."""
    n = len(header.blocks)
    if not n or len(header.generations) != n or len(header.checksums) != n or len(set(header.blocks)) != n:
        raise ProtocolError(f"KvBlocks of {n} blocks, {len(header.generations)} generations, {len(header.checksums)}")
    if header.layers != (0, layout.num_layers) or header.heads != layout.heads:
        raise ProtocolError(f"KvBlocks of layers {header.layers} and heads {header.heads}, expected {layout.heads}")
    if header.dtype != layout.dtype or header.num_bytes != n * layout.block_bytes:
        raise ProtocolError(f"KvBlocks of {header.num_bytes} bytes {header.dtype}, expected {n * layout.block_bytes}")
    if header.place is not None and header.place.layer_stride < n * layout.layer_bytes:
        raise ProtocolError(f"KvBlocks whose layers overlap: {header.place}")
