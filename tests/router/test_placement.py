"""Least load, reservations, membership."""

from __future__ import annotations

import random

import msgspec
import pytest

from engine_core.errors import NoWorkerAvailable, WorkerDied
from engine_core.messages import Load, PeerAddress, WorkerInfo
from engine_core.types import Numerics, Request, Role, SamplingParams
from router.placement import LeastLoad, Placement
from router.registry import Registry, WorkerState


class StubClient:
    def __init__(self) -> None:
        self.info: WorkerInfo | None = None
        self.heard_at = 0.0
        self.closed = False

    def start(self) -> None:
        pass

    def send(self, message: object) -> bool:
        return True

    async def close(self) -> None:
        self.closed = True


class StubListener:
    def __init__(self) -> None:
        self.lost: list[str] = []

    def on_tokens(self, message, now) -> None: ...

    def on_failed(self, worker, message) -> None: ...

    def on_lost(self, worker: WorkerState, error) -> None:
        self.lost.append(worker.name)


def info(worker_id: str, role: Role, incarnation: int = 1, fingerprint: str = "fp") -> WorkerInfo:
    return WorkerInfo(worker_id, incarnation, role, PeerAddress("h", 1, 2), fingerprint, Numerics.FAST, 8, 100, 16, 512)


def load(running: int = 0, waiting: int = 0, tokens: int = 0, draining: bool = False) -> Load:
    return Load(running, waiting, tokens, 100, draining, 0)


def request(num_tokens: int = 100) -> Request:
    return Request("r", [1] * num_tokens, num_tokens, SamplingParams())


class Fleet:
    def __init__(self, *infos: WorkerInfo, local: int = 0) -> None:
        self.listener = StubListener()
        self.registry = Registry(
            self.listener, lambda address, events: StubClient(), colocated=False, suspect_after_s=2, lost_after_s=10
        )
        self.registry.update(infos)
        for worker in self.registry.workers.values():
            worker.on_connected(worker.client, worker.info)
        self.placement = LeastLoad(self.registry, local)

    def worker(self, worker_id: str, incarnation: int = 1) -> WorkerState:
        return self.registry.workers[worker_id, incarnation]

    def place(self, num_tokens: int = 100, avoid=()) -> Placement:
        return self.placement.place(request(num_tokens), avoid)


def fleet_of(prefill: int, decode: int, **settings: int) -> Fleet:
    infos = [info(f"p{i}", Role.PREFILL) for i in range(prefill)] + [info(f"d{i}", Role.DECODE) for i in range(decode)]
    return Fleet(*infos, **settings)


async def test_spreads_a_burst_evenly() -> None:
    fleet = fleet_of(2, 3)
    for _ in range(12):
        fleet.place()
    assert [fleet.worker(f"p{i}").reserved_requests for i in range(2)] == [6, 6]
    assert [fleet.worker(f"d{i}").reserved_requests for i in range(3)] == [4, 4, 4]


async def test_prefers_what_workers_say_is_idle_and_remembers_what_it_sent_since() -> None:
    fleet = fleet_of(2, 2)
    fleet.worker("p0").on_load(fleet.worker("p0").client, load(tokens=150))
    fleet.worker("p1").on_load(fleet.worker("p1").client, load())
    fleet.worker("d0").on_load(fleet.worker("d0").client, load(running=2))
    fleet.worker("d1").on_load(fleet.worker("d1").client, load())
    chosen = [fleet.place() for _ in range(3)]
    assert [placement.prefill.info.worker_id for placement in chosen] == ["p1", "p1", "p0"]
    assert [placement.decode.info.worker_id for placement in chosen[:2]] == ["d1", "d1"]


@pytest.mark.parametrize("seed", range(20))
async def test_reservations_are_released_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    fleet = fleet_of(rng.randrange(3), 2, local=rng.choice((0, 50)))
    held: list[Placement] = []
    for _ in range(200):
        if held and rng.random() < 0.5:
            placement = rng.choice(held)
            rng.choice((placement.release_prefill, placement.release))()
        else:
            held.append(fleet.place(rng.randrange(1, 100)))
    for placement in held:
        placement.release()
        placement.release()
    for worker in fleet.registry.workers.values():
        assert (worker.reserved_requests, worker.reserved_tokens) == (0, 0)


async def test_local_prefill_for_short_prompts_and_without_prefill_workers() -> None:
    assert fleet_of(0, 1).place().prefill is None
    fleet = fleet_of(1, 1, local=50)
    assert fleet.place(50).prefill is None
    assert fleet.place(51).prefill is not None


async def test_unequal_fingerprints_are_never_paired() -> None:
    fleet = Fleet(info("p", Role.PREFILL, fingerprint="other"), info("d", Role.DECODE))
    assert fleet.place().prefill is None


async def test_avoids_suspects_draining_and_failed_workers() -> None:
    fleet = fleet_of(0, 3)
    workers = [fleet.worker(f"d{i}") for i in range(3)]
    workers[0].suspect = True
    workers[1].on_load(workers[1].client, load(draining=True))
    assert {fleet.place().decode.info.worker_id for _ in range(5)} == {"d2"}
    assert fleet.place(avoid=[workers[2]]).decode.info.worker_id in ("d0", "d2")  # d1 is out, both others are poor
    workers[2].on_load(workers[2].client, load(draining=True))
    workers[0].lose(WorkerDied("gone"))
    with pytest.raises(NoWorkerAvailable):
        fleet.place()


async def test_membership() -> None:
    fleet = fleet_of(1, 1)
    registry = fleet.registry
    assert registry.ready
    old = fleet.worker("d0")
    registry.update([info("p0", Role.PREFILL), info("d0", Role.DECODE, incarnation=2)])
    assert fleet.listener.lost == ["d0.1"]
    assert not registry.ready
    assert ("d0", 1) not in registry.workers
    new = fleet.worker("d0", 2)
    new.on_connected(new.client, info("d0", Role.DECODE, incarnation=1))  # the old one still answers there
    assert not registry.ready
    new.on_connected(new.client, msgspec.structs.replace(new.info, max_model_len=99))
    assert registry.ready
    assert registry.max_model_len == 99
    await registry.close()
    assert old.client.closed


async def test_a_worker_that_leaves_keeps_its_streams() -> None:
    fleet = fleet_of(0, 1)
    worker = fleet.worker("d0")
    worker.streams.add("a stream")
    fleet.registry.update([])
    assert worker.leaving
    assert fleet.registry.decode == []
    assert fleet.listener.lost == []
    assert fleet.worker("d0") is worker
    worker.streams.clear()
    fleet.registry.forget_idle()
    assert not fleet.registry.workers
