"""What one worker says of its cache, folded into the index: numbered events, and a snapshot where a number is missing.

    SILENT --connected--> HEALING --all parts of the snapshot--> LIVE --gap that stays open, or connected--> HEALING

While HEALING, what the index knew before stands and events wait; placement is worse off for a moment, answers are not.
A sans-I/O state machine: messages and time go in, the question to ask comes out.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from engine_core.block_hash import KEY_BYTES, Keys
from engine_core.errors import ProtocolError
from engine_core.messages import BlockEvents, BlockSnapshot, SnapshotRequest
from router.block_index import BlockIndex

GAP_S = 0.1  # how long a missing event may be on its way behind later ones
SNAPSHOT_S = 5.0  # without a new part for so long, the question or the answer was lost
MAX_WAITING = 4096  # events kept for later; with more missing, a snapshot is cheaper

WorkerKey = tuple[str, int]


class FeedState(StrEnum):
    """See the module."""

    SILENT = "silent"
    HEALING = "healing"
    LIVE = "live"


class BlockFeed:
    """One life of one worker, as one gateway hears it.

    Args:
        index: where its blocks go, under the key `worker`.
        worker: (worker_id, incarnation).

    Attributes:
        worker: as given.
        state: see the module.
        sequence: of the last event folded.
        num_snapshots: asked for.
        num_gaps: times that events were missing.
        num_fenced: messages of another life, dropped.
    """

    def __init__(self, index: BlockIndex, worker: WorkerKey) -> None:
        self.state = FeedState.SILENT
        self.num_snapshots = 0
        self.num_gaps = 0
        self.num_fenced = 0
        self._index = index
        self.worker = worker
        self.sequence = 0
        self._waiting: dict[int, BlockEvents] = {}
        self._parts: set[int] = set()
        self._behind_since: float | None = None  # since when events are missing; None: none is
        self._due = 0.0  # when to ask: HEALING again, LIVE because of a gap (0: there is none)
        index.join(worker)

    def close(self) -> None:
        """The worker is gone for good."""
        self._index.leave(self.worker)

    def connected(self, now: float) -> SnapshotRequest:
        """A connection was made: whatever was said meanwhile is lost."""
        self.lost(now)
        self._waiting.clear()
        return self._ask(now)

    def lost(self, now: float) -> None:
        """The connection ended: what the worker says from now on is missing."""
        if self._behind_since is None:
            self._behind_since = now

    def stale_s(self, now: float) -> float:
        """For how long the index has lacked something that the worker said; 0 while it has all."""
        return 0.0 if self._behind_since is None else max(0.0, now - self._behind_since)

    def on_events(self, message: BlockEvents, now: float) -> None:
        """Raises ProtocolError for what no worker says."""
        if not self._is_ours(message.worker_id, message.incarnation) or self.state is FeedState.SILENT:
            return
        if message.sequence <= self.sequence or len(self._waiting) >= MAX_WAITING:
            return
        self._waiting[message.sequence] = message
        if self.state is FeedState.LIVE:
            self._fold_waiting(now)

    def on_snapshot(self, message: BlockSnapshot, now: float) -> None:
        """A part of the answer. Raises ProtocolError for what no worker says."""
        if not self._is_ours(message.worker_id, message.incarnation) or message.number != self.num_snapshots:
            return
        if self.state is not FeedState.HEALING or message.part in self._parts:
            return
        if not 0 <= message.part < message.num_parts:
            raise ProtocolError(f"part {message.part} of a snapshot in {message.num_parts} parts")
        self._parts.add(message.part)
        self._due = now + SNAPSHOT_S
        self._index.fill_snapshot(self.worker, message.tier, _keys(message.stored))
        if len(self._parts) == message.num_parts:
            self._index.commit_snapshot(self.worker)
            self.state = FeedState.LIVE
            self.sequence = message.sequence
            self._due = 0.0
            self._waiting = {number: event for number, event in self._waiting.items() if number > message.sequence}
            self._fold_waiting(now)

    def tick(self, now: float) -> SnapshotRequest | None:
        """Call a few times a second; returns what to ask the worker, if anything."""
        if self.state is FeedState.SILENT or not self._due or now < self._due:
            return None
        if self.state is FeedState.LIVE:
            self.num_gaps += 1
        return self._ask(now)

    def _ask(self, now: float) -> SnapshotRequest:
        self.state = FeedState.HEALING
        self.num_snapshots += 1
        self._parts.clear()
        self._due = now + SNAPSHOT_S
        self._index.begin_snapshot(self.worker)
        return SnapshotRequest(self.num_snapshots)

    def _is_ours(self, worker_id: str, incarnation: int) -> bool:
        ours = (worker_id, incarnation) == self.worker
        self.num_fenced += not ours
        return ours

    def _fold_waiting(self, now: float) -> None:
        """Fold what follows without a gap; if something is left, wait for what is missing."""
        while (message := self._waiting.pop(self.sequence + 1, None)) is not None:
            self.sequence += 1
            if message.cleared:
                self._index.clear(self.worker)
            self._index.change(self.worker, message.tier, _keys(message.removed), _keys(message.stored))
            self._due = 0.0
        if not self._waiting:
            self._behind_since = None
        elif not self._due:
            self._due = now + GAP_S
            self.lost(now)


def _keys(blocks: bytes) -> Keys:
    if len(blocks) % KEY_BYTES:
        raise ProtocolError(f"{len(blocks)} bytes of block keys are no multiple of {KEY_BYTES}")
    return np.frombuffer(blocks, "<u8")
