"""The array path of a large fleet against the definition, `PairCosts`, on random fleets."""

from __future__ import annotations

import math
import random

import msgspec
import pytest

from engine_core.messages import KvShard, Load, PeerAddress, StepSums, WorkerInfo
from engine_core.types import Numerics, Role
from router.candidate import Candidate, Work
from router.cost_model import StepModel, TransferModel
from router.pair_costs import NUM_RANKED, Asked, Choice, PairCosts, PlacementConfig, Ranking, mean_busy
from router.pair_matrix import PairMatrix


class Fleet:
    """Workers of which everything is random, and to which anything may happen."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.now = rng.choice((1.0, 1e6))
        self.config = PlacementConfig(
            queue=rng.choice((1.0, 0.0)),
            prefill=rng.choice((1.0, 1.0, 0.0)),
            transfer=rng.choice((1.0, 0.5)),
            itl=rng.choice((1.0, 2.0)),
            crowding=rng.choice((1.0, 0.0)),
            followers=rng.choice((1.0, 0.0)),
            affinity_s=rng.choice((0.005, 0.5)),
            local_prefill_tokens=rng.choice((-1, 0, 300)),
        )
        self.transfers = TransferModel()
        self.sources = [self.worker(f"p{i}", Role.PREFILL) for i in range(rng.randrange(6))]
        self.targets = [self.worker(f"d{i}", Role.DECODE) for i in range(rng.randrange(1, 6))]
        self.leaving = [self.worker(f"l{i}", rng.choice((Role.PREFILL, Role.DECODE))) for i in range(2)]

    @property
    def workers(self) -> list[Candidate]:
        return self.sources + self.targets

    def worker(self, name: str, role: Role, *, alike: bool = False) -> Candidate:
        rng = random.Random(0) if alike else self.rng
        info = WorkerInfo(
            name,
            1,
            role,
            PeerAddress("h", 1, rng.choice((0, 2, 2, 2)), (KvShard("h", 2, 0, 1),) if rng.random() < 0.1 else ()),
            rng.choice(("same", "same", "same", "other")),
            Numerics.FAST,
            num_slots=8,
            num_pages=1000,
            page_size=rng.choice((16, 64)),
            max_model_len=8192,
            chunk_tokens=rng.choice((0, 256, 2048)),
            block_bytes=rng.choice((16 * 1024, 1 << 20)),
            block_namespace=rng.choice(("", "ab", "ab", "ab")) * 16,
        )
        worker = Candidate(info, StepModel(None))
        worker.usable = True
        return worker

    def happen(self) -> None:
        """Something, to some of them."""
        rng, worker = self.rng, self.rng.choice(self.workers)
        self.now += rng.random()
        match rng.randrange(7):
            case 0:
                worker.told(Load(rng.randrange(9), rng.randrange(3), rng.randrange(5000), 9, False, 0), self.now)
            case 1:
                worker.steps.learn([StepSums(1, 256, 256 * 128, 0, 0, 0, rng.random() / 10)], self.now)
                worker.steps.learn([StepSums(0, 0, 0, 1, 4, 4000, rng.random() / 10)], self.now)
            case 2:
                for source in (*self.sources, *self.leaving):
                    seconds = rng.random()
                    for size in (1000, 1 << 20, 1 << 22):
                        self.transfers.learn(source.key, worker.key, size, seconds * (1 + size / 1e6))
                self.transfers.fit(self.now)
            case 3:
                worker.info = msgspec.structs.replace(worker.info, fingerprint=rng.choice(("same", "other")))
            case 4:
                worker.release(rng.randrange(50), self.now)
            case 5:
                worker.lost()
            case _:
                tokens = rng.randrange(4000)
                worker.reserve(rng.randrange(50, 10**9), Work(tokens, 40 * tokens, rng.randrange(2), tokens), self.now)

    def asked(self) -> Asked:
        rng, num_tokens = self.rng, self.rng.randrange(1, 6000)
        held, told = {}, {}
        common = rng.randrange(num_tokens)  # that several hold
        for worker in rng.sample(self.workers, rng.randrange(len(self.workers) + 1)):
            page_size = worker.info.page_size
            held[worker.key] = rng.randrange(num_tokens // page_size + 1) * page_size
            if rng.random() < 0.7:
                told[worker.key] = rng.choice((held[worker.key], common)) // page_size * page_size
        leaving = rng.sample(self.leaving, rng.randrange(len(self.leaving) + 1))
        for worker in leaving:
            page_size = worker.info.page_size
            told[worker.key] = rng.randrange(num_tokens // page_size + 1) * page_size
        last = rng.choice((None, (None, rng.choice(self.targets).key)))
        if self.sources and rng.random() < 0.3:
            last = (rng.choice(self.sources).key, rng.choice(self.targets).key)
        if rng.random() < 0.2:
            told, leaving = {}, []
        return Asked(num_tokens, rng.random() * 500, held, last, told, leaving)

    def by_definition(self, asked: Asked) -> list[Choice]:
        return self.costs(asked).all(self.sources, self.targets)

    def ranking_by_definition(self, asked: Asked) -> Ranking:
        choices = self.by_definition(asked)
        return self.costs(asked).ranking(choices, len(choices))

    def costs(self, asked: Asked) -> PairCosts:
        busy = mean_busy(self.sources or self.targets, self.now)
        return PairCosts(self.config, self.transfers, asked, busy, self.now)


def names(choices: list[Choice]) -> list[tuple[str | None, str, str | None]]:
    return [
        (
            reader.worker.name if reader else None,
            writer.worker.name,
            reader.donor.name if reader and reader.donor else None,
        )
        for _, reader, writer, _ in choices
    ]


@pytest.mark.parametrize("seed", range(60))
def test_arrays_find_what_the_definition_does(seed: int) -> None:
    fleet = Fleet(seed)
    matrix = PairMatrix(fleet.config, fleet.transfers)
    for _ in range(30):
        for _ in range(fleet.rng.randrange(4)):
            fleet.happen()
        asked = fleet.asked()
        expected = fleet.by_definition(asked)
        found = matrix.best(fleet.sources, fleet.targets, asked, fleet.now)
        assert found.num_weighed == len(expected)
        costs = PairCosts(fleet.config, fleet.transfers, asked, found.busy, fleet.now)
        ranked = costs.some(found.pairs, fleet.sources, fleet.targets)
        assert len(ranked) == min(NUM_RANKED, len(expected))
        for one, other in zip(ranked, expected, strict=False):  # equals may change places where rounding decides
            assert math.isclose(one.key[0], other.key[0], rel_tol=1e-9, abs_tol=3e-6)
        if len(expected) > 1 and expected[1].key[0] - expected[0].key[0] > 1e-5:
            assert names(ranked[:1]) == names(expected[:1])


def test_of_equals_the_one_that_waited_longest_is_first() -> None:
    fleet = Fleet(0)
    fleet.sources = [fleet.worker(f"p{i}", Role.PREFILL) for i in range(5)]
    fleet.targets = [fleet.worker(f"d{i}", Role.DECODE) for i in range(5)]
    turns = random.Random(1).sample(range(100), 10)
    for worker, turn in zip(fleet.workers, turns, strict=True):
        worker.info = msgspec.structs.replace(
            worker.info, fingerprint="same", page_size=16, chunk_tokens=256, block_bytes=16
        )
        worker.turn = turn
    asked = Asked(100, 10.0, {}, None, {}, ())
    found = PairMatrix(fleet.config, fleet.transfers).best(fleet.sources, fleet.targets, asked, fleet.now)
    source, target = (min(workers, key=lambda one: one.turn) for workers in (fleet.sources, fleet.targets))
    assert {(source, target), (None, target)} & {pair[:2] for pair in found.pairs}


def test_a_fleet_that_changes_is_followed() -> None:
    fleet = Fleet(3)
    matrix = PairMatrix(fleet.config, fleet.transfers)
    for size in (1, 4, 2, 4):
        fleet.sources = [fleet.worker(f"p{i}", Role.PREFILL) for i in range(size)]
        fleet.targets = [fleet.worker(f"d{i}", Role.DECODE) for i in range(5 - size)]
        asked = fleet.asked()
        found = matrix.best(fleet.sources, fleet.targets, asked, fleet.now)
        assert found.num_weighed == len(fleet.by_definition(asked))
        assert {one for pair in found.pairs for one in pair[:2] if one} <= set(fleet.workers)
