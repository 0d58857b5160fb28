"""What is compiled of placement against its definitions in Python, on random fleets; and life without a compiler."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from engine_core.block_hash import BlockHasher
from engine_core.messages import Load
from engine_core.types import Request, Role, SamplingParams, Tier
from router import block_index, server
from router.block_index import BlockIndex
from router.candidate import Candidate
from router.compiled.hashing import CompiledHasher
from router.compiled.library import Compiled, Hash, open_compiled
from router.compiled.ranking import CompiledRanking
from router.pair_costs import NUM_RANKED, Ranking
from router.placement import JointPlacement, Placement
from tests.router.conftest import run_cluster
from tests.router.test_pair_matrix import Fleet

NONE = np.zeros(0, np.uint64)


def check(found: Ranking, fleet: Fleet, asked) -> None:
    expected = fleet.ranking_by_definition(asked)
    assert found.num_weighed == expected.num_weighed
    assert found.best == expected.best  # to the last bit
    assert len(found.best) == min(NUM_RANKED, found.num_weighed)


@pytest.mark.parametrize("seed", range(60))
def test_costs_and_ranks_are_those_of_the_definition(compiled: Compiled, seed: int) -> None:
    fleet = Fleet(seed)
    if seed % 3 == 0:
        fleet.sources += [fleet.worker(f"p{i}", Role.PREFILL) for i in range(10, 20)]
        fleet.targets += [fleet.worker(f"d{i}", Role.DECODE) for i in range(10, 20)]
    ranking = CompiledRanking(compiled, fleet.config, fleet.transfers)
    for _ in range(30):
        for _ in range(fleet.rng.randrange(4)):
            fleet.happen()
        asked = fleet.asked()
        check(ranking.best(fleet.sources, fleet.targets, asked, fleet.now), fleet, asked)


def test_equals_are_ranked_by_turn(compiled: Compiled) -> None:
    fleet = Fleet(0)
    fleet.sources = [fleet.worker(f"p{i}", Role.PREFILL, alike=True) for i in range(9)]
    fleet.targets = [fleet.worker(f"d{i}", Role.DECODE, alike=True) for i in range(9)]
    for worker, turn in zip(fleet.workers, random.Random(1).sample(range(100), 18), strict=True):
        worker.turn = turn
    asked = fleet.asked()._replace(held={}, last=None, told={})
    ranking = CompiledRanking(compiled, fleet.config, fleet.transfers)
    check(ranking.best(fleet.sources, fleet.targets, asked, fleet.now), fleet, asked)


def test_a_fleet_that_changes_is_followed(compiled: Compiled) -> None:
    fleet = Fleet(3)
    ranking = CompiledRanking(compiled, fleet.config, fleet.transfers)
    for size in (0, 1, 4, 2, 4):
        fleet.sources = [fleet.worker(f"p{i}", Role.PREFILL) for i in range(size)]
        fleet.targets = [fleet.worker(f"d{i}", Role.DECODE) for i in range(5 - size)]
        asked = fleet.asked()
        check(ranking.best(fleet.sources, fleet.targets, asked, fleet.now), fleet, asked)
        fleet.sources.reverse()
        check(ranking.best(fleet.sources, fleet.targets, asked, fleet.now), fleet, asked)


@pytest.fixture
def hash_tokens(compiled: Compiled) -> Hash:
    if compiled.hash is None:
        pytest.skip("this CPU has no instructions for AES")
    return compiled.hash


@pytest.mark.parametrize("page_size", [1, 3, 4, 16, 30, 128])
def test_keys_are_those_of_the_crypto_library(hash_tokens: Hash, page_size: int) -> None:
    rng = random.Random(page_size)
    for salt in (b"", b"tenant"):
        plain = BlockHasher(page_size, salt, b"namespace")
        hasher = CompiledHasher(hash_tokens, plain)
        for length in (0, 1, page_size - 1, page_size, 2 * page_size + 1, 900):
            tokens = [rng.choice((0, -1, 7, 150_000, 2**31 - 1, -(2**31))) for _ in range(length)]
            np.testing.assert_array_equal(hasher.keys(tokens), plain.keys(tokens))
            np.testing.assert_array_equal(hasher.keys(np.array(tokens, np.int64)), plain.keys(tokens))


@pytest.mark.parametrize("wrong", [2**31, -(2**31) - 1, 2**80])
def test_tokens_that_do_not_fit_are_refused(hash_tokens: Hash, wrong: int) -> None:
    plain = BlockHasher(4, b"", b"")
    for hasher in (plain, CompiledHasher(hash_tokens, plain)):
        with pytest.raises(OverflowError):
            hasher.keys([1, 2, 3, 4, 5, wrong, 7, 8])


def random_chains(rng: random.Random) -> list[np.ndarray]:
    """That share beginnings, as prompts do."""
    keys = np.random.default_rng(rng.randrange(99)).integers(0, 2**64, (8, 300), np.uint64)
    keys[1:4, :40] = keys[0, :40]
    keys[3, :90] = keys[2, :90]
    keys[5, 3] = 0  # which the table reserves
    return list(keys)


@pytest.mark.parametrize("num_workers", [1, 3, 64, 65, 150])
def test_depths_are_those_of_numpy(compiled: Compiled, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_index, "_SLICE_SLOTS", 64)  # so that moving to a larger table takes a while
    rng = random.Random(num_workers)
    indexes = [BlockIndex(50, None), BlockIndex(50, compiled)]
    chains = random_chains(rng)
    for worker in range(num_workers):
        for index in indexes:
            index.join(worker)
    moved = 0
    for step in range(400):
        worker, tier, chain = rng.randrange(num_workers), rng.choice(list(Tier)), rng.choice(chains)
        stored, removed = chain[: rng.randrange(300)], NONE
        if rng.random() < 0.2:
            stored, removed = removed, stored
        action = rng.random()
        for index in indexes:
            if action < 0.6:
                index.change(worker, tier, removed, stored)
            elif action < 0.8:
                index.predict(worker, stored)
            elif action < 0.85:
                index.clear(worker)
            elif action < 0.9:
                index.begin_snapshot(worker)
                index.fill_snapshot(worker, tier, stored)
                index.commit_snapshot(worker)
            else:
                index.tick(step / 4)
        moved += indexes[0].is_moving
        asked = rng.choice(chains)[: rng.randrange(301)]
        plain, found = (index.match_both(asked) for index in indexes)
        assert found == plain
        assert [index.match(asked) for index in indexes] == [plain[0]] * 2
    assert moved


class Twins:
    """Two placements of which the same is asked: one compiled, one not."""

    def __init__(self, compiled: Compiled, seed: int, prefill: int, decode: int) -> None:
        self.halves = [self._half(compiled, seed, prefill, decode), self._half(None, seed, prefill, decode)]

    def _half(self, compiled: Compiled | None, seed: int, prefill: int, decode: int):
        fleet = Fleet(seed)
        fleet.sources = [fleet.worker(f"p{i}", Role.PREFILL) for i in range(prefill)]
        fleet.targets = [fleet.worker(f"d{i}", Role.DECODE) for i in range(decode)]
        index = BlockIndex(100, compiled)
        for worker in fleet.workers:
            index.join(worker.key)
        return fleet, index, JointPlacement(index, fleet.transfers, fleet.config, compiled)

    def place(self, request: Request, session: str | None) -> list[Placement]:
        return [
            placement.place(
                request, fleet.sources, fleet.targets, now=fleet.now, avoid=(), session=session, donors=True
            )
            for fleet, _, placement in self.halves
        ]


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (0, 2), (2, 2), (4, 4), (7, 9)])
def test_a_life_of_decisions_is_the_same(compiled: Compiled, prefill: int, decode: int) -> None:
    rng = random.Random(prefill)
    twins = Twins(compiled, 11, prefill, decode)
    documents = [[rng.randrange(1000) for _ in range(1500)] for _ in range(4)]
    running: list[list[Placement]] = []
    for number in range(250):
        tokens = [*rng.choice(documents)[: rng.randrange(1, 1500)], *range(rng.randrange(200))]
        sampling = SamplingParams(max_tokens=rng.randrange(1, 300))
        request = Request(f"{number}", tokens, len(tokens), sampling)
        placements = twins.place(request, rng.choice((None, "a", "b")))
        assert placements[0].decision == placements[1].decision
        running.append(placements)
        ending = running.pop(rng.randrange(len(running))) if len(running) > 12 else None
        seconds, reader = rng.random() / 10, rng.randrange(prefill + decode)
        for at, (fleet, index, placement) in enumerate(twins.halves):
            if ending:
                ending[at].release_prefill(fleet.now)
                placement.handed_over(ending[at], seconds)
                ending[at].release(fleet.now)
            fleet.now += seconds
            worker: Candidate = fleet.workers[reader]
            if number % 5 == 0:
                placement.finished(len(tokens))
                worker.told(Load(number % 3, 1, 100, 9, False, 0), fleet.now)
                keys = BlockHasher(worker.info.page_size, b"", bytes.fromhex(worker.info.block_namespace)).keys(tokens)
                index.change(worker.key, Tier.DEVICE, NONE, keys)
                fleet.transfers.fit(fleet.now)
                index.tick(fleet.now)


@pytest.mark.parametrize("compilers", [["no-such-compiler"], ["false"], []])
def test_without_a_compiler_nothing_is_compiled(tmp_path: Path, compilers: list[str], caplog) -> None:
    with caplog.at_level("INFO"):
        assert open_compiled(tmp_path, compilers) is None
    assert "NumPy and Python do it" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_library_that_cannot_be_loaded_is_not_needed(tmp_path: Path, compiled: Compiled, caplog) -> None:
    path = open_and_spoil(tmp_path)
    assert open_compiled(tmp_path, ["no-such-compiler"]) is None
    assert "cannot be loaded" in caplog.text
    assert path.exists()


def open_and_spoil(directory: Path) -> Path:
    """The name under which the library would be kept, with something else in it."""
    fake = directory / "c++"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho nonsense > "$2"\n')
    fake.chmod(0o755)
    assert open_compiled(directory, [str(fake)]) is None
    return next(directory.glob("*.so"))


async def test_a_gateway_compiles_before_it_serves(
    tmp_path: Path, compiled: Compiled, model_dir, answer_ids, caplog
) -> None:
    with caplog.at_level("INFO"):
        async with run_cluster(model_dir, answer_ids, compile_cache=str(tmp_path)) as cluster:
            assert list((tmp_path / "router").glob("baton_router_*.so"))
            reply = await cluster.client.completions.create(model="demo", prompt="hello", max_tokens=200)
            assert reply.choices[0].text
    assert caplog.text.count("placement and tokenizing are compiled") == 1


async def test_a_gateway_serves_without(tmp_path: Path, model_dir, answer_ids, monkeypatch, caplog) -> None:
    monkeypatch.setattr(server, "COMPILERS", ("false",))
    async with run_cluster(model_dir, answer_ids, compile_cache=str(tmp_path)) as cluster:
        reply = await cluster.client.completions.create(model="demo", prompt="hello", max_tokens=200)
        assert reply.choices[0].text
    assert "cannot compile placement" in caplog.text
