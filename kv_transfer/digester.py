"""Who takes the digests of blocks: one xxh3_64 (Collet) over a block's bytes in all layers.

Rows are `[n, layer_bytes]` u8 arrays, one per layer, or one array of them; row i of each belongs to the same block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

Rows = Sequence[np.ndarray] | np.ndarray

SMALL_ROW_BYTES = 4096
"""Rows of at most so many bytes are put side by side before they are hashed: a call costs more than the copy."""

STREAM_BYTES = 8 << 20
"""What is more than this at once is better written past the caches: they would not keep it for its reader."""


class Reader(Protocol):
    """Reads the blocks of some rows; on any thread."""

    def digests(self, places: Sequence[int]) -> tuple[int, ...]:
        """One per block of `places`."""
        ...

    def copy(self, first: int, targets: Rows, *, streams: bool) -> tuple[int, ...]:
        """Copy as many blocks as `targets` have room for, from number `first` on, and return a digest of each.

        Args:
            targets: as many layers, with rows as long.
            streams: whether targets may be written past the caches, for a reader that finds them in memory: as fast
                as memcpy for much memory, slower for little that is used again and again.
        """
        ...


class Digester(Protocol):
    """Who makes readers.

    Attributes:
        prefers_streams: whether copies past the caches are better even for a reader that comes at once.
    """

    prefers_streams: bool

    def reader(self, rows: Rows) -> Reader:
        """One of these rows."""
        ...


class PlainDigester:
    """With xxhash's library: the definition, and what works everywhere."""

    prefers_streams = False

    def reader(self, rows: Rows) -> PlainReader:
        """See Digester."""
        return PlainReader(rows)


@dataclass(frozen=True, slots=True, eq=False)
class PlainReader:
    """Its reader."""

    rows: Rows

    def digests(self, places: Sequence[int]) -> tuple[int, ...]:
        """See Reader."""
        rows = self.rows
        if rows[0].shape[1] <= SMALL_ROW_BYTES:
            side_by_side = np.stack([row[list(places)] for row in rows], axis=1)
            return tuple(xxhash.xxh3_64_intdigest(block) for block in side_by_side)
        hashers = [xxhash.xxh3_64() for _ in places]
        for row in rows:
            for hasher, place in zip(hashers, places, strict=True):
                hasher.update(row[place])
        return tuple(hasher.intdigest() for hasher in hashers)

    def copy(self, first: int, targets: Rows, *, streams: bool) -> tuple[int, ...]:
        """See Reader. What was just written is hashed while it is still in the core's cache, layer by layer."""
        n = len(targets[0])
        rows = [row[first : first + n] for row in self.rows]
        if rows[0].shape[1] <= SMALL_ROW_BYTES:
            for row, target in zip(rows, targets, strict=True):
                np.copyto(target, row)
            return PlainReader(targets).digests(range(n))
        hashers = [xxhash.xxh3_64() for _ in range(n)]
        updates = [hasher.update for hasher in hashers]
        for row, target in zip(rows, targets, strict=True):
            np.copyto(target, row)
            for update, piece in zip(updates, target, strict=True):
                update(piece)
        return tuple(hasher.intdigest() for hasher in hashers)
