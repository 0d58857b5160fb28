"""Joint placement: costs, reservations, filters; and membership."""

from __future__ import annotations

import itertools
import random

import msgspec
import numpy as np
import pytest

from engine_core.block_hash import BlockHasher
from engine_core.errors import NoWorkerAvailable, WorkerDied
from engine_core.messages import Load, PeerAddress, StepSums, WorkerInfo
from engine_core.types import Numerics, Request, Role, SamplingParams, Tier
from router import placement as placement_module
from router.block_index import BlockIndex
from router.breaker import MAX_FAILURES, BreakerState
from router.candidate import Candidate, Work
from router.cost_model import StepModel, TransferModel
from router.pair_costs import PlacementConfig
from router.placement import JointPlacement, Placement
from router.registry import Registry, WorkerState

PAGE = 16
NAMESPACE = "ab" * 16
NONE = np.zeros(0, np.uint64)


class StubClient:
    def __init__(self) -> None:
        self.info: WorkerInfo | None = None
        self.heard_at = 0.0
        self.closed = False
        self.sent: list[object] = []

    def start(self) -> None:
        pass

    def send(self, message: object) -> bool:
        self.sent.append(message)
        return True

    async def close(self) -> None:
        self.closed = True


class StubListener:
    def __init__(self) -> None:
        self.lost: list[str] = []

    def on_tokens(self, message, now) -> None: ...

    def on_failed(self, worker, message) -> None: ...

    def on_room(self, now) -> None: ...

    def on_leaving(self, worker) -> None: ...

    def on_lost(self, worker: WorkerState, error) -> None:
        self.lost.append(worker.name)


def info(worker_id: str, role: Role, incarnation: int = 1, fingerprint: str = "fp", **changes) -> WorkerInfo:
    fields = {
        "num_slots": 8,
        "num_pages": 1000,
        "page_size": PAGE,
        "max_model_len": 8192,
        "chunk_tokens": 256,
        "block_bytes": 16 * 1024,
        "block_namespace": NAMESPACE,
        "address": PeerAddress("h", 1, 2),
        "fingerprint": fingerprint,
        "numerics": Numerics.FAST,
    }
    return WorkerInfo(worker_id, incarnation, role, **{**fields, **changes})


def load(running: int = 0, waiting: int = 0, tokens: int = 0, draining: bool = False, free_pages: int = 1000) -> Load:
    return Load(running, waiting, tokens, free_pages, draining, 0)


def request(tokens: list[int], max_tokens: int = 32, request_id: str = "r") -> Request:
    return Request(request_id, tokens, len(tokens), SamplingParams(max_tokens=max_tokens))


def text(seed: int, num_tokens: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, num_tokens).tolist()


class Fleet:
    """Candidates, an index, and a clock."""

    def __init__(self, prefill: int, decode: int, infos: tuple[WorkerInfo, ...] = (), **config: float) -> None:
        self.index = BlockIndex(100, None)
        self.transfers = TransferModel()
        self.placement = JointPlacement(self.index, self.transfers, PlacementConfig(**config), None)
        infos += tuple(info(f"p{i}", Role.PREFILL) for i in range(prefill))
        infos += tuple(info(f"d{i}", Role.DECODE) for i in range(decode))
        self.now = 100.0
        self.workers = {each.worker_id: self.candidate(each) for each in infos}
        self.count = 0

    def candidate(self, of: WorkerInfo) -> Candidate:
        candidate = Candidate(of, StepModel(None))
        candidate.connected = candidate.usable = True
        candidate.told(load(), 100.0)
        self.index.join(candidate.key)
        steps = [StepSums(1, 256, 256 * 128, 0, 0, 0, 0.028), StepSums(1, 64, 64 * 32, 0, 0, 0, 0.009)]
        steps += [StepSums(0, 0, 0, 1, rows, rows * 100, 0.004 + rows * 0.0005) for rows in (1, 4, 8)]
        candidate.steps.learn(steps * 10, self.now)
        return candidate

    def of(self, role: Role) -> list[Candidate]:
        return [worker for worker in self.workers.values() if worker.info.role is role]

    def place(
        self, tokens: list[int], avoid=(), session: str | None = None, max_tokens: int = 32, donors: bool = False
    ) -> Placement:
        self.count += 1
        asked = request(tokens, max_tokens, f"r{self.count}")
        pools = self.of(Role.PREFILL), self.of(Role.DECODE)
        return self.placement.place(asked, *pools, now=self.now, avoid=avoid, session=session, donors=donors)

    def hold(self, worker_id: str, tokens: list[int]) -> None:
        keys = BlockHasher(PAGE, b"", bytes.fromhex(NAMESPACE)).keys(tokens)
        self.index.change(self.workers[worker_id].key, Tier.DEVICE, NONE, keys)


def names(placement: Placement) -> tuple[str | None, str]:
    source = placement.prefill
    return (source.info.worker_id if source else None), placement.decode.info.worker_id


REMOTE = {"local_prefill_tokens": 0}


def test_spreads_a_burst_evenly() -> None:
    fleet = Fleet(2, 3, **REMOTE)
    for seed in range(12):
        fleet.place(text(seed, 100))
    assert [fleet.workers[f"p{i}"].reserved_requests for i in range(2)] == [6, 6]
    assert [fleet.workers[f"d{i}"].reserved_requests for i in range(3)] == [4, 4, 4]


def test_prefers_what_workers_say_is_idle_and_remembers_what_it_sent_since() -> None:
    fleet = Fleet(2, 2, **REMOTE)
    fleet.workers["p0"].told(load(tokens=150), fleet.now)
    fleet.workers["d0"].told(load(running=2), fleet.now)
    chosen = [names(fleet.place(text(seed, 100))) for seed in range(3)]
    assert [prefill for prefill, _ in chosen] == ["p1", "p1", "p0"]
    assert [decode for _, decode in chosen[:2]] == ["d1", "d1"]


def test_goes_where_the_prefix_is_on_both_sides() -> None:
    fleet = Fleet(4, 4, **REMOTE)
    tokens = text(1, 512)
    fleet.hold("p2", tokens[:400])
    fleet.hold("d3", tokens[:400])
    placement = fleet.place(tokens)
    assert names(placement) == ("p2", "d3")
    assert placement.decision.chosen.held_prefill_tokens == placement.decision.chosen.held_decode_tokens == 400
    assert placement.transfer_bytes == (32 - 25) * 16 * 1024
    assert placement.prefill_tokens == 112


def test_a_prefix_is_worth_its_milliseconds_and_no_more() -> None:
    fleet = Fleet(2, 1, **REMOTE)
    tokens = text(1, 512)
    fleet.hold("p0", tokens[:256])
    fleet.workers["p0"].told(load(tokens=100), fleet.now)
    assert names(fleet.place(tokens))[0] == "p0"
    fleet = Fleet(2, 1, **REMOTE)
    fleet.hold("p0", tokens[:256])
    fleet.workers["p0"].told(load(tokens=1000), fleet.now)
    assert names(fleet.place(tokens))[0] == "p1"


def test_a_whole_prompt_that_is_held_still_computes_its_last_block() -> None:
    fleet = Fleet(1, 1, **REMOTE)
    fleet.hold("p0", text(1, 64))
    assert fleet.place(text(1, 64)).prefill_tokens == PAGE
    assert fleet.place(text(1, 70)).prefill_tokens == 6


def test_siblings_in_a_burst_follow_the_first_by_prediction() -> None:
    fleet = Fleet(4, 4, **REMOTE)
    shared = text(1, 2048)
    first = names(fleet.place(shared + text(2, 20)))
    fleet.now += 0.2  # the first one is being read: the prediction is all there is
    second = fleet.place(shared + text(3, 20))
    assert names(second)[0] == first[0]
    assert second.prefill_tokens == 20


def test_a_busy_fleet_goes_further_for_its_prefixes() -> None:
    """What is computed again delays all that come after it, the more so the less time the fleet has to spare."""

    def source(busy: float) -> str | None:
        fleet = Fleet(2, 1, **REMOTE)
        tokens = text(1, 512)
        fleet.hold("p0", tokens[:256])
        for number, worker in enumerate(fleet.of(Role.PREFILL), -2):
            for _ in range(100):
                worker.reserve(number, Work(1, round(1e5 * busy), 0, 0), fleet.now)
                worker.release(number, fleet.now)
        fleet.workers["p0"].told(load(tokens=1000), fleet.now)
        return names(fleet.place(tokens))[0]

    assert [source(busy) for busy in (0.0, 0.3, 0.8)] == ["p1", "p1", "p0"]


def test_blocks_are_not_foretold_of_a_decode_worker_that_waits_for_them() -> None:
    """It could read a sibling's prompt long before they arrive."""
    fleet = Fleet(1, 1, **REMOTE)
    fleet.place(text(1, 512))
    held = fleet.place(text(1, 520)).decision.chosen
    assert (held.held_prefill_tokens, held.held_decode_tokens) == (512, 0)


def test_a_hot_prefix_spreads_before_its_worker_is_saturated() -> None:
    """One request at a time: no queue is ever seen, and a block that all share must not draw everything to one."""
    fleet = Fleet(4, 4, **REMOTE)
    shared = text(1, PAGE)
    counts = {f"p{i}": 0 for i in range(4)}
    for seed in range(80):
        placement = fleet.place(shared + text(seed, 600))
        counts[names(placement)[0]] += 1
        fleet.now += 0.03  # a third of what one worker could do
        placement.release(fleet.now)
        fleet.now += 0.001
    assert min(counts.values()) >= 10, counts


def test_reads_locally_where_that_is_cheaper() -> None:
    fleet = Fleet(1, 1)
    fleet.hold("d0", text(1, 512))
    assert names(fleet.place(text(1, 520))) == (None, "d0")  # d0 has nearly everything, p0 nothing
    fleet = Fleet(1, 1)
    fleet.workers["d0"].told(load(running=7), fleet.now)
    assert names(fleet.place(text(1, 2048))) == ("p0", "d0")  # it would hold up seven neighbours


def test_local_prefill_can_be_limited_and_is_all_there_is_without_prefill_workers() -> None:
    assert names(Fleet(0, 1).place(text(1, 100))) == (None, "d0")
    fleet = Fleet(1, 1, local_prefill_tokens=50)
    fleet.workers["p0"].told(load(tokens=10_000), fleet.now)
    assert names(fleet.place(text(1, 50)))[0] is None
    assert names(fleet.place(text(2, 51)))[0] == "p0"


def test_slow_links_are_avoided_and_hidden_behind_prefill() -> None:
    fleet = Fleet(1, 2, **REMOTE)
    for _ in range(30):
        fleet.transfers.learn(("p0", 1), ("d0", 1), 1_000_000, 0.1)
        fleet.transfers.learn(("p0", 1), ("d1", 1), 1_000_000, 0.001)
    fleet.transfers.fit(fleet.now)
    placement = fleet.place(text(1, 512))
    assert names(placement) == ("p0", "d1")
    slow = next(option for option in placement.decision.others if option.decode == "d0.1")
    assert slow.terms.transfer_s > 0.01 > placement.decision.chosen.terms.transfer_s


def test_what_is_sent_while_later_chunks_compute_costs_nothing() -> None:
    fleet = Fleet(1, 1, **REMOTE)
    for _ in range(30):
        fleet.transfers.learn(("p0", 1), ("d0", 1), 0, 0.0)
        fleet.transfers.learn(("p0", 1), ("d0", 1), 1_000_000, 0.01)
    fleet.transfers.fit(fleet.now)
    one = fleet.place(text(1, 256))
    two = fleet.place(text(2, 2048))
    assert one.transfer_bytes * 8 == two.transfer_bytes == 2 << 20
    assert one.decision.chosen.terms.transfer_s == pytest.approx(0.0026, rel=0.05)  # a quarter of a megabyte
    assert two.decision.chosen.terms.transfer_s == pytest.approx(0.0026, rel=0.05)  # its last chunk


def test_a_full_decode_worker_is_the_last_choice() -> None:
    fleet = Fleet(1, 2, **REMOTE)
    fleet.workers["d0"].told(load(running=8), fleet.now)
    fleet.workers["d1"].told(load(running=7), fleet.now)
    assert names(fleet.place(text(1, 100)))[1] == "d1"


def test_sessions_return_where_they_were_if_nothing_speaks_against_it() -> None:
    fleet = Fleet(3, 3, **REMOTE)
    placement = fleet.place(text(1, 10), session="s")
    first = names(placement)
    placement.release(fleet.now)
    fleet.now += 1
    for seed in range(5):
        fleet.place(text(seed, 10)).release(fleet.now)
    assert names(fleet.place(text(2, 10), session="s")) == first
    fleet.workers[first[0]].told(load(tokens=5000), fleet.now)
    assert names(fleet.place(text(3, 10), session="s"))[0] != first[0]


@pytest.mark.parametrize("seed", range(20))
def test_reservations_cannot_drift(seed: int) -> None:
    rng = random.Random(seed)
    fleet = Fleet(rng.randrange(3), 2, local_prefill_tokens=rng.choice((-1, 0, 50)))
    held: list[Placement] = []
    for _ in range(200):
        fleet.now += rng.random() / 50
        if held and rng.random() < 0.5:
            placement = rng.choice(held)
            rng.choice((placement.release_prefill, placement.release))(fleet.now)
        elif rng.random() < 0.1:
            worker = rng.choice(list(fleet.workers.values()))
            rng.choice((worker.lost, lambda worker=worker: worker.told(load(running=rng.randrange(9)), fleet.now)))()
        else:
            held.append(fleet.place(text(rng.randrange(9), rng.randrange(1, 100))))
    for placement in held:
        placement.release(fleet.now)
        placement.release(fleet.now)
    for worker in fleet.workers.values():
        assert (worker.reserved_requests, worker.reserved_tokens, worker.kv_tokens(0)) == (0, 0, 0)
        worker.told(load(), fleet.now)
        assert (worker.queue_s(fleet.now), worker.num_rows()) == (0, 0)
        worker.reserve(0, Work(1, 1000, 0, 0), fleet.now)
        assert worker.queue_s(fleet.now) == 0.001


def test_rows_that_came_and_went_since_the_last_beat_count_for_nothing() -> None:
    fleet = Fleet(0, 1)
    worker = fleet.workers["d0"]
    running = [fleet.place(text(seed, 10)) for seed in range(3)]
    worker.told(load(running=3), fleet.now)
    running[0].release(fleet.now)
    assert worker.num_rows() == 2
    fleet.place(text(9, 10)).release(fleet.now)
    assert worker.num_rows() == 2


def test_unequal_fingerprints_are_never_paired() -> None:
    fleet = Fleet(0, 1, (info("p", Role.PREFILL, fingerprint="other"),), **REMOTE)
    assert names(fleet.place(text(1, 100))) == (None, "d0")
    fleet = Fleet(1, 2, (info("p", Role.PREFILL, fingerprint="x"), info("d", Role.DECODE, fingerprint="x")), **REMOTE)
    pairs = {names(fleet.place(text(seed, 100))) for seed in range(30)}
    assert pairs <= {("p", "d"), ("p0", "d0"), ("p0", "d1")}
    assert len(pairs) == 3


def test_page_sizes_may_differ() -> None:
    tokens = text(1, 256)
    fleet = Fleet(1, 1, (info("p64", Role.PREFILL, page_size=64),), **REMOTE)
    keys = BlockHasher(64, b"", bytes.fromhex(NAMESPACE)).keys(tokens)
    fleet.index.change(("p64", 1), Tier.DEVICE, NONE, keys)
    placement = fleet.place([*tokens, 1])
    assert names(placement)[0] == "p64"
    assert placement.prefill_tokens == 1


def test_suspects_and_those_that_failed_are_the_last_resort() -> None:
    fleet = Fleet(0, 3)
    fleet.workers["d0"].suspect = True
    fleet.workers["d1"].usable = False
    assert {names(fleet.place(text(seed, 10)))[1] for seed in range(5)} == {"d2"}
    placement = fleet.place(text(1, 10), avoid=[("d2", 1)])
    assert names(placement)[1] == "d0"
    assert placement.decision.excluded == {
        "d0.1": "silent",
        "d1.1": "draining or not connected",
        "d2.1": "failed this request",
    }
    fleet.workers["d0"].usable = False
    assert names(fleet.place(text(1, 10), avoid=[("d2", 1)]))[1] == "d2"
    fleet.workers["d2"].usable = False
    with pytest.raises(NoWorkerAvailable):
        fleet.place(text(1, 10))


@pytest.mark.parametrize("seed", range(10))
def test_the_matrix_of_a_large_fleet_agrees_with_pairs_weighed_one_by_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions = []
    for small in (0, 10_000):
        monkeypatch.setattr(placement_module, "SMALL", small)
        rng = random.Random(seed)
        strangers = (info("px", Role.PREFILL, fingerprint="x"), info("dx", Role.DECODE, fingerprint="x"))
        fleet = Fleet(5, 4, strangers if seed % 2 else (), local_prefill_tokens=rng.choice((-1, 0)))
        for worker in fleet.workers.values():
            worker.told(load(running=rng.randrange(9), tokens=rng.randrange(500)), fleet.now)
        for source, target in itertools.product(range(5), range(4)):
            seconds = rng.random() / 10
            for _ in range(2):  # the first connects
                fleet.transfers.learn((f"p{source}", 1), (f"d{target}", 1), 1_000_000, seconds)
        fleet.transfers.fit(fleet.now)
        fleet.hold(f"p{rng.randrange(5)}", text(seed, 512))
        fleet.hold(f"d{rng.randrange(4)}", text(seed, 300))
        decisions.append([fleet.place(text(seed, 600), session="s").decision for _ in range(8)])
    for one, other in zip(*decisions, strict=True):
        assert one.num_weighed == other.num_weighed
        assert (one.chosen.prefill, one.chosen.decode) == (other.chosen.prefill, other.chosen.decode)
        assert one.chosen.terms.total_s == pytest.approx(other.chosen.terms.total_s)


def test_an_open_breaker_gets_one_probe() -> None:
    fleet = Fleet(2, 1, **REMOTE)
    broken = fleet.workers["p0"]
    for _ in range(MAX_FAILURES):
        broken.breaker.failed(fleet.now)
    assert {names(fleet.place(text(seed, 10)))[0] for seed in range(6)} == {"p1"}
    fleet.now += 1.1
    fleet.workers["p1"].told(load(tokens=5000), fleet.now)
    assert [names(fleet.place(text(seed, 10)))[0] for seed in range(3)] == ["p0", "p1", "p1"]
    broken.breaker.succeeded()
    assert names(fleet.place(text(9, 10)))[0] == "p0"
    assert broken.breaker.state is BreakerState.CLOSED


def test_has_room_until_slots_or_prompts_pile_up() -> None:
    fleet = Fleet(1, 1)
    sides = fleet.of(Role.PREFILL), fleet.of(Role.DECODE)
    assert fleet.placement.has_room(*sides, fleet.now)
    fleet.workers["d0"].told(load(running=8, waiting=2), fleet.now)
    assert not fleet.placement.has_room(*sides, fleet.now)
    fleet.workers["d0"].told(load(), fleet.now)
    fleet.workers["p0"].told(load(tokens=100_000), fleet.now)
    assert fleet.placement.has_room(*sides, fleet.now)  # the decode worker may read it
    fleet.workers["d0"].told(load(tokens=100_000), fleet.now)
    assert not fleet.placement.has_room(*sides, fleet.now)


def test_without_local_prefill_only_prefill_workers_make_room() -> None:
    fleet = Fleet(1, 1, **REMOTE)
    fleet.workers["p0"].told(load(tokens=100_000), fleet.now)
    assert not fleet.placement.has_room(fleet.of(Role.PREFILL), fleet.of(Role.DECODE), fleet.now)


def test_options_come_in_order_of_their_cost() -> None:
    rng = random.Random(3)
    for seed in range(30):
        fleet = Fleet(3, 3)
        for worker in fleet.workers.values():
            worker.told(load(running=rng.randrange(8), tokens=rng.randrange(2000)), fleet.now)
        fleet.hold(f"p{rng.randrange(3)}", text(seed, 512))
        fleet.hold(f"d{rng.randrange(3)}", text(seed, 300))
        decision = fleet.place(text(seed, 600)).decision
        assert decision.num_weighed == 12
        totals = [decision.chosen.terms.total_s, *(option.terms.total_s for option in decision.others)]
        assert totals == sorted(totals)
        for option in (decision.chosen, *decision.others):
            assert all(
                getattr(option.terms, name) >= 0 for name in option.terms.__struct_fields__ if name != "affinity_s"
            )


# membership


class Members:
    def __init__(self, *infos: WorkerInfo) -> None:
        self.listener = StubListener()
        self.registry = Registry(
            self.listener,
            lambda address, events: StubClient(),
            index=BlockIndex(100, None),
            transfers=TransferModel(),
            colocated=False,
            suspect_after_s=2,
            lost_after_s=10,
        )
        self.registry.update(infos)
        for worker in self.registry.workers.values():
            worker.on_connected(worker.client, worker.info)

    def worker(self, worker_id: str, incarnation: int = 1) -> WorkerState:
        return self.registry.workers[worker_id, incarnation]


async def test_membership() -> None:
    fleet = Members(info("p0", Role.PREFILL), info("d0", Role.DECODE))
    registry = fleet.registry
    assert registry.ready
    old = fleet.worker("d0")
    registry.update([info("p0", Role.PREFILL), info("d0", Role.DECODE, incarnation=2)])
    assert fleet.listener.lost == ["d0.1"]
    assert not registry.ready
    assert ("d0", 1) not in registry.workers
    new = fleet.worker("d0", 2)
    assert registry.candidates[Role.DECODE] == [new.candidate]
    assert not new.candidate.usable
    new.on_connected(new.client, info("d0", Role.DECODE, incarnation=1))  # the old one still answers there
    assert not registry.ready
    new.on_connected(new.client, msgspec.structs.replace(new.info, max_model_len=99))
    assert registry.ready
    assert registry.max_model_len == 99
    assert new.candidate.usable
    await registry.close()
    assert old.client.closed


async def test_a_worker_that_leaves_keeps_its_streams() -> None:
    fleet = Members(info("d0", Role.DECODE))
    worker = fleet.worker("d0")
    worker.streams.add("a stream")
    fleet.registry.update([])
    assert worker.leaving
    assert not worker.candidate.usable
    assert fleet.registry.decode == []
    assert fleet.listener.lost == []
    assert fleet.worker("d0") is worker
    worker.streams.clear()
    fleet.registry.forget_idle()
    assert not fleet.registry.workers
    assert fleet.registry.candidates[Role.DECODE] == []


async def test_a_draining_worker_gets_nothing_new() -> None:
    fleet = Members(info("d0", Role.DECODE))
    worker = fleet.worker("d0")
    worker.on_load(worker.client, load(draining=True))
    assert not worker.candidate.usable
    worker.on_load(worker.client, load())
    assert worker.candidate.usable
    worker.lose(WorkerDied("gone"))
    assert not worker.candidate.usable
