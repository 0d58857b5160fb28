"""Blocks on the host: rows of bytes, their checksums, and their way into another memory.

Rows are those of `kv_transfer.digester`, which takes a block's digest; its checksum is the digest mixed with its name,
(request_id, epoch, block_index, generation). The digest is taken once, as early as the bytes are touched anyway, and
travels with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from kv_transfer.arena import Segment
from kv_transfer.base import Layers
from kv_transfer.digester import Digester, Rows
from kv_transfer.layout import BlockLayout
from kv_transfer.ticket import Ticket
from kv_transfer.wire import KvBlocks, Place


@dataclass(frozen=True, slots=True, eq=False)
class HostBlocks:
    """What a prefill worker handed over.

    Attributes:
        rows: per layer, all blocks.
        place: where they lie in shared memory, if they do: the first row of the first layer, and the way to the next.
        digests: one per block, taken when they were put there; None: not taken yet.
    """

    rows: Rows
    place: Place | None
    digests: tuple[int, ...] | None = None

    def checksums(
        self,
        places: Sequence[int],
        ticket_key: tuple[str, int],
        blocks: Sequence[tuple[int, int]],
        digester: Digester,
    ) -> tuple[int, ...]:
        """One per block of `places`, whose (block_index, generation) are `blocks`."""
        if self.digests is None:
            return named(digester.reader(self.rows).digests(places), ticket_key, blocks)
        return named([self.digests[place] for place in places], ticket_key, blocks)


@dataclass(frozen=True, slots=True, eq=False)
class LandedBlocks:
    """What arrived at a decode worker.

    Attributes:
        rows: per layer.
        segment: the memory they lie in, None where no other process can map it.
        offset: there, of the first layer's rows.
        layer_stride: bytes from one layer's rows to the next one's.
    """

    rows: Rows
    segment: Segment | None
    offset: int
    layer_stride: int


def as_rows(layers: Layers, n: int, layout: BlockLayout) -> tuple[np.ndarray, ...]:
    """The arrays' bytes, in place where they are contiguous; checked against the layout."""
    if len(layers) != layout.num_layers:
        raise ValueError(f"{len(layers)} layers, expected {layout.num_layers}")
    for layer in layers:
        if layer.shape != (n, *layout.shape) or layer.dtype.itemsize != layout.numpy_dtype.itemsize:
            raise ValueError(f"{layer.dtype} {layer.shape}, expected {layout.dtype} {(n, *layout.shape)}")
    return tuple(np.ascontiguousarray(layer).reshape(n, -1).view(np.uint8) for layer in layers)


def payload_rows(payload: np.ndarray, n: int, layout: BlockLayout) -> np.ndarray:
    """The rows of a payload of n blocks, `[L * n * layer_bytes]` u8, in place: `[L, n, layer_bytes]`."""
    return payload.reshape(layout.num_layers, n, layout.layer_bytes)


def strided_bytes(n: int, layer_stride: int, layout: BlockLayout) -> int:
    """From the first to the last byte of n blocks whose layers lie `layer_stride` apart."""
    return (layout.num_layers - 1) * layer_stride + n * layout.layer_bytes


def strided_rows(memory: np.ndarray, n: int, layer_stride: int, layout: BlockLayout) -> np.ndarray:
    """The rows of n blocks in `[strided_bytes]` u8, in place: `[L, n, layer_bytes]`."""
    layer_bytes = layout.layer_bytes
    shape, strides = (layout.num_layers, n, layer_bytes), (layer_stride, layer_bytes, 1)
    return np.ndarray(shape, np.uint8, memory, strides=strides)


def as_layers(rows: Rows, layout: BlockLayout) -> list[np.ndarray]:
    """Rows as read-only arrays of the layout's dtype, `[n, page_size, 2K, H]`, in place."""
    if isinstance(rows, np.ndarray):
        whole = rows.view(layout.numpy_dtype).reshape(*rows.shape[:2], *layout.shape)
        whole.flags.writeable = False
        return list(whole)
    layers = [row.view(layout.numpy_dtype).reshape(-1, *layout.shape) for row in rows]
    for layer in layers:
        layer.flags.writeable = False
    return layers


def named(found: Sequence[int], ticket_key: tuple[str, int], blocks: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Checksums of digests: of the same bytes under another name they differ."""
    request_id, epoch = ticket_key
    return tuple(
        xxhash.xxh3_64_intdigest(f"{request_id} {epoch} {index} {generation}".encode(), digest)
        for digest, (index, generation) in zip(found, blocks, strict=True)
    )


def is_intact(header: KvBlocks, digests: Sequence[int]) -> bool:
    """Whether every block's bytes, of which these are the digests, are those that were sent under that name."""
    blocks = list(zip(header.blocks, header.generations, strict=True))
    return named(digests, (header.request_id, header.epoch), blocks) == header.checksums


def block_header(
    ticket: Ticket,
    blocks: Sequence[tuple[int, int]],
    sums: tuple[int, ...],
    layout: BlockLayout,
    frame: int,
    place: Place | None,
    pull: int = 0,
) -> KvBlocks:
    """Header of the (block_index, generation) `blocks`."""
    return KvBlocks(
        ticket.request_id,
        ticket.epoch,
        ticket.serial,
        frame,
        tuple(index for index, _ in blocks),
        tuple(generation for _, generation in blocks),
        (0, layout.num_layers),
        layout.heads,
        layout.dtype,
        sums,
        len(blocks) * layout.block_bytes,
        place,
        pull,
    )


def first_run(places: Sequence[int], limit: int) -> range:
    """The longest run of consecutive places at the front, at most `limit`."""
    count = 1
    while count < min(limit, len(places)) and places[count] == places[0] + count:
        count += 1
    return range(places[0], places[0] + count)
