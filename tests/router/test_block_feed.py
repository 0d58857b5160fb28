"""Events that are lost, doubled, late or of another life: the index heals, whatever happened."""

from __future__ import annotations

import heapq
import itertools
import random
from typing import Any

import numpy as np
import pytest

from engine_core.block_hash import KEY_BYTES
from engine_core.errors import ProtocolError
from engine_core.messages import BlockEvents, BlockSnapshot, SnapshotRequest
from engine_core.prefix_cache import BlockRemoved, BlocksCleared, BlockStored
from engine_core.types import Tier
from kv_transfer import block_publisher
from kv_transfer.block_publisher import BlockPublisher
from router.block_feed import GAP_S, SNAPSHOT_S, BlockFeed, FeedState
from router.block_index import BlockIndex

BLOCKS = [np.random.default_rng(block).bytes(16) for block in range(200)]


def keys_of(blocks: list[int]) -> np.ndarray:
    return np.frombuffer(b"".join(BLOCKS[block][:KEY_BYTES] for block in blocks), "<u8")


def held_by(index: BlockIndex, worker: tuple[str, int]) -> set[int]:
    return {block for block in range(len(BLOCKS)) if worker in index.match(keys_of([block]))}


class World:
    """A worker whose cache changes at random, and a gateway behind a link that loses, doubles and delays."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.index = BlockIndex(16, None)
        self.now = 0.0
        self.harm = 0.3
        self.life = 0
        self.mail: list[tuple[float, int, Any]] = []
        self.serial = itertools.count()
        self.feed: BlockFeed | None = None
        self.restart()

    def restart(self) -> None:
        if self.feed is not None:
            self.feed.close()
        self.life += 1
        self.blocks: set[int] = set()
        self.publisher = BlockPublisher("w", self.life)
        self.feed = BlockFeed(self.index, ("w", self.life))
        self.connect()

    def connect(self) -> None:
        self.post(self.feed.connected(self.now))

    def post(self, message: Any) -> None:
        while self.rng.random() < self.harm:
            if self.rng.random() < 0.5:
                return
            self.mail_out(message)
        self.mail_out(message)

    def mail_out(self, message: Any) -> None:
        delay = self.rng.choice((0.01, 0.01, 0.02, 0.3)) if self.harm else 0.01
        heapq.heappush(self.mail, (self.now + delay, next(self.serial), (self.life, message)))

    def change(self) -> None:
        events = []
        for _ in range(self.rng.randrange(1, 30)):
            block = self.rng.randrange(len(BLOCKS))
            kind = self.rng.random()
            if kind < 0.01:
                self.blocks.clear()
                events.append(BlocksCleared())
            elif kind < 0.4:
                self.blocks.discard(block)
                events.append(BlockRemoved(BLOCKS[block]))
            else:
                self.blocks.add(block)
                events.append(BlockStored(BLOCKS[block], None))
        self.post(self.publisher.publish(Tier.DEVICE, events))

    def deliver(self) -> None:
        while self.mail and self.mail[0][0] <= self.now:
            _, _, (life, message) = heapq.heappop(self.mail)
            if isinstance(message, SnapshotRequest):
                if life == self.life:
                    hashes = [BLOCKS[block] for block in self.blocks]
                    for part in self.publisher.snapshot(message.number, {Tier.DEVICE: hashes}):
                        self.post(part)
            elif isinstance(message, BlockEvents):
                self.feed.on_events(message, self.now)
            else:
                self.feed.on_snapshot(message, self.now)

    def step(self) -> None:
        self.now += 0.05
        self.deliver()
        self.index.tick(self.now)
        question = self.feed.tick(self.now)
        if question is not None:
            self.post(question)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happened_the_index_heals(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_publisher, "SNAPSHOT_BLOCKS", 20)
    world = World(seed)
    for _ in range(200):
        world.rng.choice([world.change] * 6 + [world.step] * 6 + [world.connect] + [world.restart] * (seed % 2))()
    world.harm = 0.0
    for _ in range(round(3 * SNAPSHOT_S / 0.05)):
        world.step()
        if world.rng.random() < 0.2:
            world.change()
    for _ in range(3):
        world.step()
    assert world.feed.state is FeedState.LIVE
    assert held_by(world.index, ("w", world.life)) == world.blocks
    assert not [worker for worker in world.index.match(keys_of([0])) if worker != ("w", world.life)]


def events(sequence: int, stored: list[int], worker: str = "w", life: int = 1) -> BlockEvents:
    return BlockEvents(worker, life, sequence, Tier.DEVICE, False, b"", keys_of(stored).tobytes())


def live_feed(sequence: int, stored: list[int]) -> tuple[BlockIndex, BlockFeed]:
    index = BlockIndex(16, None)
    feed = BlockFeed(index, ("w", 1))
    question = feed.connected(0.0)
    feed.on_snapshot(
        BlockSnapshot("w", 1, question.number, 0, 1, sequence, Tier.DEVICE, keys_of(stored).tobytes()), 0.0
    )
    assert feed.state is FeedState.LIVE
    return index, feed


def test_another_life_is_fenced_off() -> None:
    index, feed = live_feed(3, [1])
    feed.on_events(events(4, [2], life=2), 0.0)
    feed.on_events(events(4, [3], worker="other"), 0.0)
    feed.on_snapshot(BlockSnapshot("w", 2, 1, 0, 1, 9, Tier.DEVICE, b""), 0.0)
    assert (held_by(index, ("w", 1)), feed.num_fenced) == ({1}, 3)


def test_events_of_before_the_snapshot_are_in_it_already() -> None:
    index, feed = live_feed(3, [1])
    feed.on_events(events(2, [5]), 0.0)
    feed.on_events(events(3, [6]), 0.0)
    feed.on_events(events(4, [7]), 0.0)
    assert held_by(index, ("w", 1)) == {1, 7}
    feed.on_events(events(4, [8]), 0.0)  # doubled
    assert held_by(index, ("w", 1)) == {1, 7}
    assert feed.tick(10.0) is None


def test_a_gap_that_closes_in_time_costs_nothing() -> None:
    index, feed = live_feed(0, [])
    feed.on_events(events(2, [2]), 0.0)
    assert feed.tick(GAP_S / 2) is None
    feed.on_events(events(1, [1]), GAP_S / 2)
    assert (held_by(index, ("w", 1)), feed.tick(1.0)) == ({1, 2}, None)


def test_a_gap_asks_once_and_old_knowledge_stands_until_the_answer() -> None:
    index, feed = live_feed(0, [9])
    feed.on_events(events(2, [2]), 0.0)
    question = feed.tick(GAP_S)
    assert question == SnapshotRequest(2)
    assert feed.tick(GAP_S + 0.1) is None
    assert held_by(index, ("w", 1)) == {9}
    feed.on_snapshot(BlockSnapshot("w", 1, 2, 0, 1, 1, Tier.DEVICE, keys_of([1]).tobytes()), 0.2)
    assert held_by(index, ("w", 1)) == {1, 2}
    assert feed.num_gaps == 1


def test_how_stale_the_index_is() -> None:
    _, feed = live_feed(0, [])
    assert feed.stale_s(50.0) == 0.0
    feed.on_events(events(2, [2]), 60.0)
    feed.on_events(events(3, [3]), 61.0)
    assert feed.stale_s(61.5) == 1.5, "since the first event behind a gap"
    question = feed.tick(62.0)
    assert question is not None and feed.stale_s(62.0) == 2.0
    feed.on_snapshot(BlockSnapshot("w", 1, question.number, 0, 1, 3, Tier.DEVICE, b""), 63.0)
    assert feed.stale_s(64.0) == 0.0
    feed.lost(70.0)
    assert feed.stale_s(72.0) == 2.0
    question = feed.connected(75.0)
    feed.on_snapshot(BlockSnapshot("w", 1, question.number, 0, 1, 9, Tier.DEVICE, b""), 76.0)
    assert feed.stale_s(77.0) == 0.0


def test_nonsense_is_a_protocol_error() -> None:
    _, feed = live_feed(0, [])
    with pytest.raises(ProtocolError, match="multiple"):
        feed.on_events(BlockEvents("w", 1, 1, Tier.DEVICE, False, b"", b"123"), 0.0)
    feed.connected(1.0)
    with pytest.raises(ProtocolError, match="part 5"):
        feed.on_snapshot(BlockSnapshot("w", 1, 2, 5, 1, 1, Tier.DEVICE, b""), 1.0)


def test_only_the_last_word_on_a_block_is_published() -> None:
    publisher = BlockPublisher("w", 1)
    one, two, three = (BLOCKS[i][:KEY_BYTES] for i in range(3))
    message = publisher.publish(
        Tier.DEVICE,
        [
            BlockStored(BLOCKS[0], None),
            BlocksCleared(),
            BlockStored(BLOCKS[1], None),
            BlockRemoved(BLOCKS[0]),
            BlockStored(BLOCKS[2], None),
            BlockRemoved(BLOCKS[1]),
        ],
    )
    assert (message.sequence, message.cleared) == (1, True)
    assert (message.removed, message.stored) == (two + one, three)
    assert publisher.snapshot(7, {})[0].sequence == 1
