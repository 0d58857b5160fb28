"""Blocks of one worker's page size and dtype made into blocks of another's.

The wire carries logical heads, so that tensor parallelism and packing leave no trace in it; page size and dtype do.
The sender converts, to the layout of the receiver that asked. Narrower dtypes round to nearest even, and float8 clips
what is beyond 448 units, as the engine does when it writes; page sizes are exact, and so are wider dtypes but for the
rounding of values whose unit is no power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from engine_core.errors import LayoutMismatch
from kv_transfer.blocks import HostBlocks
from kv_transfer.layout import BlockLayout
from kv_transfer.ticket import Landing, Ticket

_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FLOAT8_MAX = 448.0

Converted = tuple[tuple[int, ...], HostBlocks, int]
"""Block indices, the blocks, their bytes."""


def check_convertible(mine: BlockLayout, theirs: BlockLayout) -> None:
    """Refuse a receiver whose blocks ours cannot be made into.

    Raises:
        LayoutMismatch: layers, KV heads or head size differ.
    """
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        if getattr(mine, name) != getattr(theirs, name):
            raise LayoutMismatch(f"{name} is {getattr(theirs, name)} there and {getattr(mine, name)} here")


@dataclass(slots=True)
class _Partial:
    """A block of the receiver's of which some tokens have come."""

    layers: list[np.ndarray]  # [page_size, 2K, H]; zero where nothing has come
    num_tokens: int = 0


@dataclass(slots=True)
class Repaging:
    """One hand-off's conversion.

    Attributes:
        mine: layout of the blocks that are added.
        theirs: layout of those that come out.
    """

    mine: BlockLayout
    theirs: BlockLayout
    _partial: dict[int, _Partial] = field(default_factory=dict)

    def own_ticket(self, ticket: Ticket) -> Ticket:
        """The ticket in our blocks: all that have a token of a block wanted; they may lie beyond the prompt's end."""
        wanted: set[int] = set()
        for landing in ticket.landing:
            first = landing.block_index * self.theirs.page_size
            wanted.update(
                range(first // self.mine.page_size, -(-(first + self.theirs.page_size) // self.mine.page_size))
            )
        landings = tuple(Landing(index, 0) for index in sorted(wanted))
        return Ticket(ticket.request_id, ticket.epoch, ticket.serial, landings, ticket.lease_ms)

    def add(self, block_indices: Sequence[int], blocks: HostBlocks) -> list[Converted]:
        """The receiver's blocks that are complete now."""
        layers = [row.view(self.mine.numpy_dtype).reshape(-1, *self.mine.shape) for row in blocks.rows]
        converted: list[Converted] = []
        start = 0
        for end in range(1, len(block_indices) + 1):
            if end < len(block_indices) and block_indices[end] == block_indices[end - 1] + 1:
                continue
            tokens = [layer[start:end].reshape(-1, *self.mine.shape[1:]) for layer in layers]
            converted += self._add_tokens(block_indices[start] * self.mine.page_size, tokens)
            start = end
        return converted

    def flush(self) -> list[Converted]:
        """What is not complete and never will be: the end of the prompt, zeros behind it."""
        partial, self._partial = self._partial, {}
        return [self._emit([index], [layer[None] for layer in block.layers]) for index, block in partial.items()]

    def _add_tokens(self, first: int, tokens: list[np.ndarray]) -> list[Converted]:
        """`tokens` are consecutive ones, from number `first` on, per layer `[T, 2K, H]`."""
        size, count = self.theirs.page_size, len(tokens[0])
        begin, end = -(-first // size), (first + count) // size  # whole blocks
        if begin > end:  # within one block
            return self._add_part(first, tokens)
        converted = []
        if first < begin * size:
            converted += self._add_part(first, [layer[: begin * size - first] for layer in tokens])
        if begin < end:
            whole = [layer[begin * size - first : end * size - first] for layer in tokens]
            shape = (end - begin, *self.theirs.shape)
            converted.append(self._emit(range(begin, end), [layer.reshape(shape) for layer in whole]))
        if end * size < first + count:
            converted += self._add_part(end * size, [layer[end * size - first :] for layer in tokens])
        return converted

    def _add_part(self, first: int, tokens: list[np.ndarray]) -> list[Converted]:
        """Tokens of a single block."""
        index, offset = divmod(first, self.theirs.page_size)
        block = self._partial.get(index)
        if block is None:
            zeros = [np.zeros(self.theirs.shape, self.mine.numpy_dtype) for _ in tokens]
            block = self._partial[index] = _Partial(zeros)
        for layer, part in zip(block.layers, tokens, strict=True):
            layer[offset : offset + len(part)] = part
        block.num_tokens += len(tokens[0])
        if block.num_tokens < self.theirs.page_size:
            return []
        del self._partial[index]
        return [self._emit([index], [layer[None] for layer in block.layers])]

    def _emit(self, indices: Sequence[int], layers: list[np.ndarray]) -> Converted:
        units = self.mine.layer_units
        rows = tuple(
            np.ascontiguousarray(_cast(layer, self.theirs.numpy_dtype, None if units is None else units[number]))
            .reshape(len(indices), -1)
            .view(np.uint8)
            for number, layer in enumerate(layers)
        )
        return tuple(indices), HostBlocks(rows, None), len(indices) * self.theirs.block_bytes


def _cast(values: np.ndarray, dtype: np.dtype[Any], units: np.ndarray | None) -> np.ndarray:
    """`[..., 2K, H]`; `units` are those of float8, `[2K]` f32."""
    if values.dtype == dtype:
        return values
    if dtype != _FLOAT8:
        if units is None or values.dtype != _FLOAT8:
            return values.astype(dtype)
        wide = values.astype(np.float32)
        wide *= units[:, None]
        return wide.astype(dtype)
    wide = values.astype(np.float32)
    if units is not None:
        wide *= 1 / units[:, None]
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        return np.clip(wide, -_FLOAT8_MAX, _FLOAT8_MAX).astype(dtype)
