"""A worker's side of the global index: its cache's changes as numbered messages, and snapshots of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine_core.block_hash import KEY_BYTES
from engine_core.messages import BlockEvents, BlockSnapshot
from engine_core.prefix_cache import BlockEvent, BlockRemoved, BlockStored
from engine_core.types import Tier

SNAPSHOT_BLOCKS = 4096  # per part: gateways fold a part in a few milliseconds


class BlockPublisher:
    """Numbers the messages of one incarnation.

    Args:
        worker_id, incarnation: who publishes.
    """

    def __init__(self, worker_id: str, incarnation: int) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._sequence = 0

    def publish(self, tier: Tier, events: Sequence[BlockEvent]) -> BlockEvents:
        """One message for some events, in order. Only the last word on each block is told."""
        cleared = False
        present: dict[bytes, bool] = {}
        for event in events:
            if isinstance(event, BlockStored):
                present[event.block_hash[:KEY_BYTES]] = True
            elif isinstance(event, BlockRemoved):
                present[event.block_hash[:KEY_BYTES]] = False
            else:
                cleared = True
                present.clear()
        self._sequence += 1
        removed = b"".join(key for key, is_present in present.items() if not is_present)
        stored = b"".join(key for key, is_present in present.items() if is_present)
        return BlockEvents(self._worker_id, self._incarnation, self._sequence, tier, cleared, removed, stored)

    def snapshot(self, number: int, hashes: Mapping[Tier, Sequence[bytes]]) -> list[BlockSnapshot]:
        """What each tier holds after everything published so far. An empty cache makes one empty part."""
        parts = [
            (tier, of_tier[start : start + SNAPSHOT_BLOCKS])
            for tier, of_tier in hashes.items()
            for start in range(0, len(of_tier), SNAPSHOT_BLOCKS)
        ] or [(Tier.DEVICE, [])]
        return [
            BlockSnapshot(
                worker_id=self._worker_id,
                incarnation=self._incarnation,
                number=number,
                part=index,
                num_parts=len(parts),
                sequence=self._sequence,
                tier=tier,
                stored=b"".join(block_hash[:KEY_BYTES] for block_hash in part),
            )
            for index, (tier, part) in enumerate(parts)
        ]
