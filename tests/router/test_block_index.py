"""The index against a dictionary of sets."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine_core.types import Tier
from router import block_index
from router.block_index import PREDICTION_S, BlockIndex
from router.block_table import BlockTable
from router.compiled.library import Compiled

NONE = np.zeros(0, np.uint64)


KEYS = np.random.default_rng(7).integers(1, 2**64, 4000, np.uint64)
KEYS[5] = 0  # which the table reserves


def keys_of(*numbers: int) -> np.ndarray:
    return KEYS[list(numbers)]


class Naive:
    """What the index shall answer."""

    def __init__(self) -> None:
        self.held: dict[str, dict[Tier, set[int]]] = {}

    def depth(self, worker: str, chain: list[int]) -> int:
        blocks = set().union(*self.held[worker].values())
        return next((i for i, block in enumerate(chain) if block not in blocks), len(chain))

    def match(self, chain: list[int]) -> dict[str, int]:
        depths = {worker: self.depth(worker, chain) for worker in self.held}
        return {worker: depth for worker, depth in depths.items() if depth}


class Pair:
    """The index and the reference, told the same."""

    def __init__(self, rng: random.Random, num_blocks: int, compiled: Compiled | None) -> None:
        self.rng = rng
        self.index = BlockIndex(num_blocks, compiled)
        self.naive = Naive()
        self.now = 0.0
        self.names = 0

    def join(self) -> None:
        self.names += 1
        self.index.join(f"w{self.names}")
        self.naive.held[f"w{self.names}"] = {tier: set() for tier in Tier}

    def any_worker(self) -> str:
        return self.rng.choice(list(self.naive.held))

    def chain(self) -> list[int]:
        start = self.rng.randrange(0, 3000)
        return list(range(start, start + self.rng.randrange(1, 60)))

    def change(self) -> None:
        worker, tier = self.any_worker(), self.rng.choice(list(Tier))
        held = self.naive.held[worker][tier]
        stored = self.chain()
        removed = [block for block in self.rng.sample(sorted(held), len(held) // 4) if block not in stored]
        held.difference_update(removed)
        held.update(stored)
        self.index.change(worker, tier, keys_of(*removed), keys_of(*stored))

    def snapshot(self) -> None:
        worker = self.any_worker()
        self.index.begin_snapshot(worker)
        blocks: dict[Tier, set[int]] = {tier: set() for tier in Tier}
        for _ in range(self.rng.randrange(5)):
            tier, part = self.rng.choice(list(Tier)), self.chain()
            self.index.fill_snapshot(worker, tier, keys_of(*part))
            blocks[tier].update(part)
            if self.rng.random() < 0.3:
                self.change()
        if self.rng.random() < 0.3:
            self.index.drop_snapshot(worker)
            return
        self.index.commit_snapshot(worker)
        self.naive.held[worker] = blocks

    def clear(self) -> None:
        worker = self.any_worker()
        self.index.clear(worker)
        self.naive.held[worker] = {tier: set() for tier in Tier}

    def leave(self) -> None:
        if len(self.naive.held) > 2:
            worker = self.any_worker()
            self.index.leave(worker)
            del self.naive.held[worker]

    def tick(self) -> None:
        self.now += 0.25
        self.index.tick(self.now)

    def check(self) -> None:
        chain = self.chain()
        assert self.index.match(keys_of(*chain)) == self.naive.match(chain)


@pytest.fixture(params=["numpy", "compiled"])
def lookups(request: pytest.FixtureRequest) -> Compiled | None:
    return request.getfixturevalue("compiled") if request.param == "compiled" else None


@pytest.mark.parametrize("seed", range(12))
def test_answers_equal_those_of_sets(seed: int, lookups: Compiled | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(block_index, "_SLICE_SLOTS", 200)  # moves and rounds overlap with everything else
    monkeypatch.setattr(block_index, "_FOLD_KEYS", rng.choice((1, 100, 16384)))
    monkeypatch.setattr(block_index, "_MATCH_BLOCKS", rng.choice((1, 8, 1024)))
    pair = Pair(rng, 50, lookups)
    for _ in range(rng.choice((3, 70))):
        pair.join()
    actions = [pair.change] * 10 + [pair.tick, pair.check] * 6 + [pair.snapshot, pair.clear, pair.leave, pair.join]
    for _ in range(800):
        rng.choice(actions)()
    for _ in range(100):
        pair.check()


def test_columns_are_reused_once_they_are_clean() -> None:
    index = BlockIndex(1000, None)
    index.join("a")
    for life in range(300):
        index.change("a", Tier.DEVICE, NONE, keys_of(*range(1 + life, 20 + life)))
        index.clear("a")
        assert index.match(keys_of(*range(1 + life, 20 + life))) == {}
        index.tick(life)
    assert index._num_columns < 8
    for now in range(4):
        index.tick(300 + now)
    assert len(index) == 0


def test_predictions_are_believed_for_a_while_and_not_for_ever() -> None:
    index = BlockIndex(100, None)
    index.join("a")
    index.join("b")
    index.tick(0.0)
    index.tick(PREDICTION_S - 0.1)
    index.predict("a", keys_of(1, 2, 3))
    index.predict("gone", keys_of(1, 2, 3))
    index.change("b", Tier.DEVICE, NONE, keys_of(1, 2))
    for now in np.arange(PREDICTION_S, 2 * PREDICTION_S - 0.2, 0.5):
        index.tick(float(now))
        assert index.match(keys_of(1, 2, 3, 4)) == {"a": 3, "b": 2}
        assert index.match_both(keys_of(1, 2, 3, 4)) == ({"a": 3, "b": 2}, {"b": 2})
    index.change("a", Tier.DEVICE, NONE, keys_of(1))
    index.tick(2 * PREDICTION_S + 0.1)
    index.tick(3 * PREDICTION_S + 0.2)
    assert index.match(keys_of(1, 2, 3, 4)) == {"a": 1, "b": 2}


@pytest.mark.parametrize("rotations", [0, 1])
def test_what_a_worker_says_has_left_is_not_predicted_any_more(rotations: int) -> None:
    index = BlockIndex(100, None)
    index.join("a")
    index.join("b")
    index.tick(0.0)
    for worker in ("a", "b"):
        index.predict(worker, keys_of(1, 2, 3))
    for number in range(rotations):
        index.tick((1 + number) * PREDICTION_S)
    index.change("a", Tier.DEVICE, NONE, keys_of(1, 2, 3))
    assert index.match(keys_of(1, 2, 3)) == {"a": 3, "b": 3}
    index.change("a", Tier.DEVICE, keys_of(2, 3), NONE)
    assert index.match(keys_of(1, 2, 3)) == {"a": 1, "b": 3}
    assert index.match_both(keys_of(1, 2, 3)) == ({"a": 1, "b": 3}, {"a": 1})


def test_a_block_in_two_tiers_is_held_until_it_leaves_both() -> None:
    index = BlockIndex(100, None)
    index.join("a")
    index.change("a", Tier.DEVICE, NONE, keys_of(1, 2))
    index.change("a", Tier.HOST, NONE, keys_of(2, 3))
    assert index.match(keys_of(1, 2, 3)) == {"a": 3}
    index.change("a", Tier.DEVICE, keys_of(2), NONE)
    assert index.match(keys_of(1, 2, 3)) == {"a": 3}
    index.change("a", Tier.HOST, keys_of(2), NONE)
    assert index.match(keys_of(1, 2, 3)) == {"a": 1}


def test_full_buckets_let_keys_move() -> None:
    rng = np.random.default_rng(1)
    table = BlockTable(500, 1)
    keys = rng.integers(1, 2**64, 3900, np.uint64)  # 97 % of the slots
    masks = np.full(len(keys), 5, np.uint64)
    refused = table.add(keys, 0, 0, masks)
    assert len(refused) < 200
    stored = np.delete(keys, refused)
    slots = table.locate(stored)
    assert (slots >= 0).all()
    assert len(np.unique(slots)) == len(stored) == table.num_used
    assert (table.gather(slots, 0, 1) == 5).all()
    table.remove(stored, (0,), 0, np.full(len(stored), 5, np.uint64))
    assert table.num_used == 0


def test_64_workers_hold_parts_of_200_000_blocks() -> None:
    rng = np.random.default_rng(0)
    index = BlockIndex(200_000, None)
    keys = rng.integers(1, 2**64, 200_000, np.uint64)
    for worker in range(64):
        index.join(worker)
        index.change(worker, Tier.DEVICE, NONE, keys[worker * 2000 :][:60_000])
    assert index.match(keys[130_000:130_512]) == dict.fromkeys(range(36, 64), 512)
