"""Messages between a decode worker and the prefill workers it fetches KV from, and their bytes.

A frame is a big-endian u32 length and that many bytes of msgpack; behind a `KvBlocks` follow `num_bytes` of payload,
layer-major: `[L][n][page_size][2K][H]`. No frame carries an address: blocks are named by (request_id, epoch,
block_index, generation), and each block's checksum covers that name. The ticket's serial is there because a page's
generation alone does not name the page: after a request moved, the same block may wait in another page of the same
generation (the simulator found it).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import xxhash

from engine_core.errors import ProtocolError
from engine_core.messages import Challenge, Refused, TokenChunk
from kv_transfer.layout import BlockLayout
from kv_transfer.ticket import Ticket

MAX_HEADER_BYTES = 4 << 20
LENGTH = struct.Struct(">I")


class KvMessage(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base: on the wire an array whose first item is the class name."""


class KvHello(KvMessage, frozen=True):
    """First message of a decode worker, answered by the prefill worker's. (worker_id, incarnation) is one life."""

    protocol: int
    worker_id: str
    incarnation: int
    fingerprint: str
    secret_proof: bytes
    nonce: bytes


class TicketMsg(KvMessage, frozen=True):
    """Decode -> prefill: push me these blocks."""

    ticket: Ticket


class TicketCancel(KvMessage, frozen=True):
    """Decode -> prefill: no longer wanted."""

    request_id: str
    epoch: int


class KvBlocks(KvMessage, frozen=True):
    """Prefill -> decode: header of n blocks, whose payload follows.

    Attributes:
        layers: range of layers, heads: range of KV heads; version 1 always sends all of both.
        checksums: one per block, see `checksum`.
    """

    request_id: str
    epoch: int
    serial: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    layers: tuple[int, int]
    heads: tuple[int, int]
    dtype: str
    checksums: tuple[int, ...]
    num_bytes: int


class KvDone(KvMessage, frozen=True):
    """Prefill -> decode: all blocks of ticket `serial` went before this."""

    request_id: str
    epoch: int
    serial: int
    first_token: TokenChunk


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


FromDecode = KvHello | TicketMsg | TicketCancel | KvBeat
FromPrefill = Challenge | Refused | KvHello | KvBlocks | KvDone | KvAbort | KvBeat

from_decode: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromDecode)
from_prefill: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromPrefill)
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """One frame, without payload."""
    body = _ENCODER.encode(message)
    return LENGTH.pack(len(body)) + body


def block_header(
    ticket: Ticket, blocks: Sequence[tuple[int, int]], pieces: Sequence[memoryview], layout: BlockLayout
) -> KvBlocks:
    """Header of the (block_index, generation) `blocks`; `pieces[layer * n + i]` are the bytes of block i."""
    n = len(blocks)
    checksums = tuple(
        checksum(pieces[i::n], ticket.request_id, ticket.epoch, index, generation)
        for i, (index, generation) in enumerate(blocks)
    )
    return KvBlocks(
        ticket.request_id,
        ticket.epoch,
        ticket.serial,
        tuple(index for index, _ in blocks),
        tuple(generation for _, generation in blocks),
        (0, layout.num_layers),
        (0, layout.num_kv_heads),
        layout.dtype,
        checksums,
        n * layout.block_bytes,
    )


def checksum(pieces: Sequence[memoryview], request_id: str, epoch: int, block_index: int, generation: int) -> int:
    """xxh3_64 over the bytes of one block in all layers, and its name."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    digest.update(f"{request_id} {epoch} {block_index} {generation}".encode())
    return int(digest.intdigest())


def split(payload: memoryview, n: int, layout: BlockLayout) -> list[memoryview]:
    """Pieces of a payload of n blocks: `[layer * n + i]` are the bytes of block i in that layer."""
    size = layout.layer_bytes
    return [payload[at : at + size] for at in range(0, n * layout.block_bytes, size)]


def verified(header: KvBlocks, payload: memoryview, layout: BlockLayout) -> bool:
    """Whether every block's bytes are those that were sent under that name."""
    n = len(header.blocks)
    pieces = split(payload, n, layout)
    return all(
        checksum(pieces[i::n], header.request_id, header.epoch, header.blocks[i], header.generations[i])
        == header.checksums[i]
        for i in range(n)
    )


def as_layers(payload: memoryview, n: int, layout: BlockLayout) -> list[np.ndarray]:
    """The payload as one read-only array per layer, `[n, page_size, 2K, H]`, in place."""
    whole = np.frombuffer(payload.toreadonly(), layout.numpy_dtype)
    return list(whole.reshape(layout.num_layers, n, *layout.shape))


def check_header(header: KvBlocks, layout: BlockLayout) -> None:
    """Refuse a header that contradicts itself or the layout, before a byte of payload is read for it."""
    n = len(header.blocks)
    if not n or len(header.generations) != n or len(header.checksums) != n or len(set(header.blocks)) != n:
        raise ProtocolError(f"KvBlocks of {n} blocks, {len(header.generations)} generations, {len(header.checksums)}")
    if header.layers != (0, layout.num_layers) or header.heads != (0, layout.num_kv_heads):
        raise ProtocolError(f"KvBlocks of layers {header.layers} and heads {header.heads} is not all of them")
    if header.dtype != layout.dtype or header.num_bytes != n * layout.block_bytes:
        raise ProtocolError(f"KvBlocks of {header.num_bytes} bytes {header.dtype}, expected {n * layout.block_bytes}")
