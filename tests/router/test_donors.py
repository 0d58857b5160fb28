"""Blocks that a prefill worker lacks and another worker holds: who donates, when it pays, and what the workers hear."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from engine_core.errors import WorkerDied
from engine_core.messages import (
    Decode,
    Distribution,
    Donate,
    Failed,
    KvShard,
    LinkStats,
    Load,
    PeerAddress,
    Prefill,
    WorkerStats,
)
from engine_core.types import Role, SamplingParams
from router.block_feed import FeedState
from router.placement import Placement
from tests.fakes import FakeWorker
from tests.router.conftest import Cluster, run_cluster
from tests.router.test_placement import PAGE, REMOTE, Fleet, Members, info, load, names, request, text

TOKENS = text(1, 512)
BODY = {"model": "demo", "prompt": list(range(3, 103)), "temperature": 0, "max_tokens": 8}


def busy(fleet: Fleet, *worker_ids: str, tokens: int = 5000) -> None:
    for worker_id in worker_ids:
        fleet.workers[worker_id].told(load(tokens=tokens), fleet.now)


def donor_of(placement: Placement) -> str | None:
    return placement.donor.info.worker_id if placement.donor else None


def fleet_with_donor(**config: float) -> Fleet:
    """Worker p0 holds most of the prompt, and has no time."""
    fleet = Fleet(2, 2, **{**REMOTE, **config})
    fleet.hold("p0", TOKENS[:400])
    busy(fleet, "p0")
    return fleet


def test_an_idle_worker_fetches_what_a_busy_one_holds() -> None:
    fleet = fleet_with_donor()
    placement = fleet.place(TOKENS, donors=True)
    assert names(placement)[0] == "p1"
    assert (donor_of(placement), placement.donor_blocks, placement.prefill_tokens) == ("p0", 25, 112)
    chosen = placement.decision.chosen
    assert (chosen.donor, chosen.held_prefill_tokens, chosen.fetched_tokens) == ("p0.1", 0, 400)
    assert fleet.workers["p1"].reserved_tokens == 112
    plain = fleet_with_donor().place(TOKENS)
    assert (names(plain)[0], donor_of(plain), plain.prefill_tokens) == ("p1", None, 512)
    assert donor_of(fleet_with_donor(donors=False).place(TOKENS, donors=True)) is None


def test_the_fetched_blocks_are_foretold_of_who_fetches_them() -> None:
    fleet = fleet_with_donor()
    fleet.place(TOKENS, donors=True)
    second = fleet.place([*TOKENS, *text(2, 20)], donors=True)
    assert (names(second)[0], donor_of(second), second.prefill_tokens) == ("p1", None, 20)


def test_a_slow_link_is_not_worth_it() -> None:
    fleet = fleet_with_donor()
    for _ in range(9):
        fleet.transfers.learn(fleet.workers["p0"].key, fleet.workers["p1"].key, 400 * 1024, 5.0)
    fleet.transfers.fit(fleet.now)
    assert donor_of(fleet.place(TOKENS, donors=True)) is None


def test_a_fetch_that_the_queue_hides_costs_nothing() -> None:
    def fetch_s(queued: int) -> float:
        fleet = fleet_with_donor()
        for source in ("p0", "d0"):
            for size in (1, 1 << 20) * 9:
                fleet.transfers.learn(fleet.workers[source].key, fleet.workers["p1"].key, size, 0.002 + size * 1e-9)
        fleet.transfers.fit(fleet.now)
        busy(fleet, "p1", tokens=queued)
        placement = fleet.place(TOKENS, donors=True)
        assert donor_of(placement) == "p0"
        terms = placement.decision.chosen.terms
        assert terms.ttft_s == terms.queue_s + terms.fetch_s + terms.prefill_s
        return terms.fetch_s

    assert fetch_s(0) > 0
    assert fetch_s(600) == 0.0


def test_what_is_only_foretold_cannot_be_fetched() -> None:
    fleet = Fleet(2, 1, **REMOTE)
    assert names(fleet.place(TOKENS, donors=True))[0] == "p0"
    busy(fleet, "p0")
    second = fleet.place(TOKENS, donors=True)
    assert (names(second)[0], donor_of(second)) == ("p1", None)


def test_the_longest_match_donates_and_decode_workers_before_prefill_workers() -> None:
    fleet = Fleet(3, 2, **REMOTE)
    for worker_id, held in (("p0", 400), ("p1", 400), ("d0", 384), ("d1", 400)):
        fleet.hold(worker_id, TOKENS[:held])
    busy(fleet, "p0", "p1")
    first = fleet.place(TOKENS, donors=True)
    assert (names(first)[0], donor_of(first)) == ("p2", "d1")


def test_of_equal_donors_the_one_that_waited_longest() -> None:
    fleet = Fleet(4, 1, **REMOTE)
    busy(fleet, "p0", "p1", "p2", tokens=50_000)
    for number in range(6):
        for worker_id in ("p0", "p1", "p2"):
            fleet.hold(worker_id, text(number, 512))
    chosen = [donor_of(fleet.place(text(number, 512), donors=True)) for number in range(6)]
    assert chosen == ["p0", "p1", "p2"] * 2


def test_the_last_block_of_a_prompt_that_is_held_whole_is_computed() -> None:
    fleet = Fleet(1, 1, **REMOTE)
    fleet.hold("d0", TOKENS)
    placement = fleet.place(TOKENS, donors=True)
    assert (donor_of(placement), placement.donor_blocks, placement.prefill_tokens) == ("d0", 31, PAGE)


def test_less_than_a_block_more_is_no_match() -> None:
    fleet = Fleet(1, 1, **REMOTE)
    fleet.hold("d0", TOKENS)
    fleet.hold("p0", TOKENS[: 512 - PAGE])
    assert donor_of(fleet.place(TOKENS, donors=True)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "other"},
        {"address": PeerAddress("h", 1, 0)},
        {"address": PeerAddress("h", 1, 2, (KvShard("h", 2, 0, 1), KvShard("i", 2, 1, 1)))},
        {"block_namespace": ""},
    ],
)
@pytest.mark.parametrize("worker_id", ["p0", "p1"])
def test_who_cannot_exchange_blocks_does_not(change: dict, worker_id: str) -> None:
    """Either the donor or who would fetch."""
    fleet = fleet_with_donor()
    worker = fleet.workers[worker_id]
    worker.info = msgspec.structs.replace(worker.info, **change)
    assert donor_of(fleet.place(TOKENS, donors=True)) is None


def test_a_worker_that_drains_donates_until_it_is_gone() -> None:
    fleet = fleet_with_donor()
    donor = fleet.workers["p0"]
    donor.usable = False
    assert donor_of(fleet.place(TOKENS, donors=True)) == "p0"
    fleet = fleet_with_donor()
    assert donor_of(fleet.place(TOKENS, donors=True, avoid=[fleet.workers["p0"].key])) is None
    for field, value in (("connected", False), ("suspect", True)):
        fleet = fleet_with_donor()
        fleet.workers["p0"].usable = False
        setattr(fleet.workers["p0"], field, value)
        assert donor_of(fleet.place(TOKENS, donors=True)) is None


def test_prompts_that_are_computed_whole_fetch_nothing() -> None:
    fleet = fleet_with_donor()
    asked = msgspec.structs.replace(request(TOKENS), sampling=SamplingParams(max_tokens=1, prompt_logprobs=True))
    pools = fleet.of(Role.PREFILL), fleet.of(Role.DECODE)
    placement = fleet.placement.place(asked, *pools, now=fleet.now, avoid=(), session=None, donors=True)
    assert donor_of(placement) is None


def stats(**links: LinkStats) -> WorkerStats:
    none = Distribution([], 0.0)
    by_address = {f"{name}:2": link for name, link in links.items()}
    return WorkerStats(none, none, none, none, *([0] * 8), 0.0, 0.0, 0, 0, by_address, {})


async def test_links_from_donors_are_learned_from_what_workers_count() -> None:
    at = {name: PeerAddress(name, 1, 2) for name in ("p0", "p1", "d0")}
    roles = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE}
    fleet = Members(*(info(name, roles[name], address=at[name]) for name in at))
    transfers = fleet.registry._transfers
    before = transfers.link(fleet.worker("p0").candidate.key, fleet.worker("p1").candidate.key)
    for reader in ("p1", "d0"):
        worker = fleet.worker(reader)
        for beat in range(1, 9):
            link = LinkStats(2 * beat, 0, beat << 21, beat * 4.0)  # two fetches of 1 MiB in 2 s each
            worker.on_stats(worker.client, stats(p0=link, unknown=link))
    transfers.fit(1.0)
    learned = transfers.link(fleet.worker("p0").candidate.key, fleet.worker("p1").candidate.key)
    assert learned[0] + learned[1] * 2**20 == pytest.approx(2.0, rel=0.05)
    assert learned[0] + learned[1] * 2**20 > 10 * (before[0] + before[1] * 2**20)
    # a decode worker's own times of hand-overs contain prefill
    pair = fleet.worker("p0").candidate.key, fleet.worker("d0").candidate.key
    assert pair not in transfers._connected
    await fleet.registry.close()


# over the wire


@pytest.fixture
async def trio(model_dir: Path, answer_ids: list[int]) -> AsyncIterator[Cluster]:
    """Of two prefill workers the first holds the prompt, and is busy."""
    async with run_cluster(model_dir, answer_ids, prefill=2, decode=2, block_namespace="ab" * 16) as cluster:
        await ready(cluster, cluster.prefill[0])
        cluster.prefill[0].beat(Load(0, 0, 100_000, 100, False, 0))
        await cluster.until(lambda: cluster.service.registry.prefill[0].load.queued_tokens > 0)
        yield cluster
        await cluster.until(lambda: not cluster.service._streams)
        for worker in cluster.service.registry.workers.values():
            assert (worker.candidate.reserved_requests, len(worker.streams), len(worker.donations)) == (0, 0, 0)


async def ready(cluster: Cluster, holder: FakeWorker) -> None:
    feeds = [worker.feed for worker in cluster.service.registry.workers.values()]
    await cluster.until(lambda: all(feed.state is FeedState.LIVE for feed in feeds))
    holder.publish(BODY["prompt"], cluster.service.salt)
    await cluster.until(lambda: len(cluster.service.index) >= 6)


def heard(worker: FakeWorker) -> list[str]:
    return [type(message).__name__ for message in worker.received]


def post(cluster: Cluster, **headers: str) -> asyncio.Task:
    return asyncio.create_task(cluster.http.post("/v1/completions", json=BODY, headers=headers))


async def test_all_three_are_told_and_the_donor_when_it_is_over(trio: Cluster) -> None:
    reply = await post(trio, **{"x-baton-debug": "1"})
    assert reply.status_code == 200
    assert "prefill=prefill-1.1;" in reply.headers["x-baton-placement"]
    assert "donor=prefill-0.1; fetched=96" in reply.headers["x-baton-placement"]
    (asked,) = [message for message in trio.prefill[1].received if isinstance(message, Prefill)]
    assert (asked.donor, asked.donor_blocks) == (trio.prefill[0].info.address, 6)
    await trio.until(lambda: heard(trio.prefill[0]) == ["Donate", "Cancel"])
    donate = trio.prefill[0].received[0]
    assert isinstance(donate, Donate)
    assert (donate.request, donate.num_blocks) == (asked.request, 6)
    assert 0 < donate.deadline_ms <= asked.deadline_ms
    assert heard(trio.prefill[1]) == ["Prefill"]
    metrics = (await trio.http.get("/metrics")).text
    assert "baton_fetches_total 1.0" in metrics


async def test_a_client_that_leaves_frees_the_donor_too(trio: Cluster) -> None:
    trio.prefill[1].silent = True
    call = post(trio)
    await trio.until(lambda: heard(trio.prefill[1]) == ["Prefill"])
    call.cancel()
    await trio.until(lambda: heard(trio.prefill[0]) == ["Donate", "Cancel"])
    await trio.until(lambda: heard(trio.prefill[1]) == ["Prefill", "Cancel"])


async def test_an_attempt_that_failed_with_a_donor_goes_on_without(trio: Cluster) -> None:
    for worker in trio.decode:
        worker.fail = 1
    assert (await post(trio)).status_code == 200
    asked = [message for message in trio.prefill[1].received if isinstance(message, Prefill)]
    assert [(message.request.epoch, message.donor is None) for message in asked] == [(0, False), (1, True), (2, True)]
    assert heard(trio.prefill[0]) == ["Donate", "Cancel"]


async def test_a_donor_that_fails_or_dies_fails_nothing(trio: Cluster) -> None:
    trio.prefill[1].silent = True
    call = post(trio)
    await trio.until(lambda: heard(trio.prefill[0]) == ["Donate"])
    (link,) = trio.prefill[0]._server.links
    request_id = trio.prefill[0].received[0].request.request_id
    link.send(Failed(request_id, 0, "transfer_failed", "made to fail", True))
    await asyncio.sleep(0.05)
    await trio.prefill[0].stop()
    await trio.until(lambda: len(trio.service.registry.prefill) == 1)
    trio.prefill[1].silent = False
    reply = await call
    assert reply.status_code == 200
    assert heard(trio.prefill[1]) == ["Prefill"]
    assert trio.service.metrics.retries.total() == 0


async def test_a_donor_that_is_gone_is_done_without(trio: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def send(message: object) -> bool:
        raise WorkerDied("gone")

    monkeypatch.setattr(trio.service.registry.prefill[0].client, "send", send)
    assert (await post(trio)).status_code == 200
    (asked,) = [message for message in trio.prefill[1].received if isinstance(message, Prefill)]
    assert (asked.donor, asked.donor_blocks) == (None, 0)
    assert heard(trio.prefill[0]) == []


async def test_a_decode_worker_that_donates_to_its_own_request_is_not_cancelled(
    model_dir: Path, answer_ids: list[int]
) -> None:
    async with run_cluster(model_dir, answer_ids, prefill=1, decode=1, block_namespace="ab" * 16) as cluster:
        await ready(cluster, cluster.decode[0])
        reply = await post(cluster)
        assert reply.json()["usage"]["completion_tokens"] == 8
        assert heard(cluster.decode[0]) == ["Donate", "Decode"]
        (decode,) = [message for message in cluster.decode[0].received if isinstance(message, Decode)]
        assert decode.prefill == cluster.prefill[0].info.address
        (asked,) = cluster.prefill[0].received
        assert asked.donor == cluster.decode[0].info.address
