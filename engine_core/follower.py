"""A host that is not the first of its worker: it makes the device calls of the leader's engine, in the same order.

What it is told is checked against the sizes that it compiled for: nothing it hears makes it compile, or read beyond an
array.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from engine_core.engine import TRANSFER_LADDER, Engine, PendingPages
from engine_core.errors import ProtocolError
from engine_core.host_commands import (
    Export,
    ExportAbort,
    ExportCommand,
    ExportFinish,
    ExportOffer,
    Gather,
    InitSlot,
    KvHeads,
    KvPiece,
    RunStep,
    Scatter,
)
from engine_core.resolve import ResolvedEngine
from engine_core.step_io import StepInputs


class Exports(Protocol):
    """Where a follower hands its part of gathered pages over."""

    def blocks(self, export: Export, layers: list[np.ndarray]) -> None:
        """Blocks; per layer `[n, page_size, 2k, H]`, the k KV heads that this host hands over."""

    def tell(self, command: ExportCommand) -> None:
        """What becomes of a hand-over."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Shapes and dtypes of a step's inputs."""

    leaves: list[tuple[tuple[int, ...], np.dtype[Any]]]
    tree: Any

    @classmethod
    def of(cls, inputs: StepInputs) -> _Bucket:
        leaves, tree = jax.tree.flatten(inputs)
        return cls([(np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves], tree)

    def unpack(self, content: bytes) -> StepInputs:
        """Undo `Engine.dispatch`."""
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.leaves)
        if len(content) != size:
            raise ProtocolError(f"the inputs of a step have {len(content)} bytes, expected {size}")
        arrays, at = [], 0
        for shape, dtype in self.leaves:
            count = math.prod(shape)
            arrays.append(np.frombuffer(content, dtype, count, at).reshape(shape))
            at += count * dtype.itemsize
        inputs: StepInputs = jax.tree.unflatten(self.tree, arrays)
        return inputs


class Follower:
    """Runs commands on one thread.

    Args:
        engine: of this host.
        buckets: neutral inputs of every bucket.
        exports: None where nothing is handed over.
    """

    def __init__(self, engine: Engine, buckets: Sequence[StepInputs], exports: Exports | None) -> None:
        assert engine.shards is not None
        self._engine = engine
        self._shards = engine.shards
        self._buckets = {(len(inputs.tokens), len(inputs.kv_lens)): _Bucket.of(inputs) for inputs in buckets}
        self._exports = exports
        self._gathers: deque[tuple[Export, PendingPages]] = deque()
        self._pieces = bytearray()

    @property
    def held(self) -> KvHeads:
        """KV heads of this host's devices."""
        return self._shards.own

    @property
    def exported(self) -> KvHeads:
        """Those of them that this host hands over."""
        return self._shards.exported[jax.process_index()]

    @property
    def resolved(self) -> ResolvedEngine:
        """Sizes of the replica."""
        return self._engine.resolved

    def run(self, command: Any) -> None:
        """Do what the leader does.

        Raises:
            ProtocolError: the leader cannot have said that.
        """
        match command:
            case RunStep(num_tokens, num_rows, inputs):
                bucket = self._buckets.get((num_tokens, num_rows))
                if bucket is None:
                    raise ProtocolError(f"a step of {num_tokens} tokens and {num_rows} sequences is no bucket")
                self._engine.dispatch(bucket.unpack(inputs))
            case InitSlot(slot, prompt_ids, output_ids):
                longest = self._engine.resolved.max_model_len
                if not 0 <= slot < self._engine.resolved.num_slots or max(len(prompt_ids), len(output_ids)) > longest:
                    raise ProtocolError(f"slot {slot} with {len(prompt_ids)} and {len(output_ids)} tokens")
                self._engine.init_slot(slot, prompt_ids, output_ids)
            case Gather(pages, export):
                self._gather(pages, export)
            case KvPiece(content):
                if len(self._pieces) + len(content) > self._pages_bytes(TRANSFER_LADDER[0]):
                    raise ProtocolError("more KV than one write takes")
                self._pieces += content
            case Scatter(pages):
                self._scatter(pages)
            case ExportOffer() | ExportFinish() | ExportAbort():
                self._tell(command)
            case _:
                raise ProtocolError(f"{type(command).__name__} to a follower")

    def tick(self) -> bool:
        """Hand over what has reached the host; whether more is on its way."""
        while self._gathers and self._gathers[0][1].is_ready():
            self._hand_over()
        return bool(self._gathers)

    def _gather(self, pages: tuple[int, ...], export: Export | None) -> None:
        self._check_pages(pages)
        if export is not None and len(export.blocks) != len(pages):
            raise ProtocolError(f"{len(pages)} pages for {len(export.blocks)} blocks")
        pending = self._engine.gather(pages)
        if export is not None and self._exports is not None:
            self._gathers.append((export, pending))

    def _scatter(self, pages: tuple[int, ...]) -> None:
        self._check_pages(pages)
        if len(pages) not in TRANSFER_LADDER:
            raise ProtocolError(f"{len(pages)} pages in one write")
        if not self._pieces:
            self._engine.scatter_nothing(pages)
            return
        if len(self._pieces) != self._pages_bytes(len(pages)):
            raise ProtocolError(f"{len(self._pieces)} bytes of KV for {len(pages)} pages")
        content, self._pieces = bytes(self._pieces), bytearray()
        self._engine.scatter_own(pages, self._layers(content, len(pages)))

    def _layers(self, content: bytes, num_pages: int) -> list[np.ndarray]:
        layout = self._engine.resolved.layout
        shape = (layout.num_layers, num_pages, layout.page_size, 2 * self.held.count, layout.head_dim)
        return list(np.frombuffer(content, jax.numpy.dtype(layout.dtype)).reshape(shape))

    def _pages_bytes(self, num_pages: int) -> int:
        layout = self._engine.resolved.layout
        return num_pages * layout.block_bytes // layout.num_kv_heads * self.held.count

    def _check_pages(self, pages: tuple[int, ...]) -> None:
        limit = self._engine.resolved.layout.num_pages
        if not pages or min(pages) < 0 or max(pages) > limit:
            raise ProtocolError(f"page ids outside [0, {limit}]")

    def _tell(self, command: ExportCommand) -> None:
        if self._exports is None:
            raise ProtocolError("a hand-over to a follower that hands nothing over")
        key = (command.request_id, command.epoch)
        if isinstance(command, ExportAbort):
            kept = [(export, pages) for export, pages in self._gathers if (export.request_id, export.epoch) != key]
            self._gathers = deque(kept)
        elif isinstance(command, ExportFinish):
            while any((export.request_id, export.epoch) == key for export, _ in self._gathers):
                self._hand_over()
        self._exports.tell(command)

    def _hand_over(self) -> None:
        """The oldest copy, waiting for it if need be."""
        assert self._exports is not None
        export, pages = self._gathers.popleft()
        own, exported = self.held, self.exported
        if exported.count:
            first = 2 * (exported.first - own.first)
            layers = [layer[:, :, first : first + 2 * exported.count] for layer in pages.wait()]
            self._exports.blocks(export, layers)
