"""Blocks that come from a donor in the simulated fleet: small cases whose times can be computed by hand."""

from __future__ import annotations

import dataclasses

import pytest

from router.candidate import Candidate
from router.placement import PlacementConfig
from router.simulator.cluster import Cluster, Crash, hash_trace
from router.simulator.policies import Reservation
from router.simulator.profile import QWEN3_32B_TPU7X
from router.simulator.synthesis import Shape, synthesize
from tests.router.simulator.cases import SCENARIO, cluster, trace_of

# The first prompt is read by prefill-0, the second by prefill-1: blocks 1 and 2 are in both.
TRACE = trace_of((0.0, [1, 2, 3], 25, 1), (100.0, [1, 2, 4], 25, 1))


def with_donor(*, donor: str = "prefill-0", num_blocks: int = 2, trace=TRACE, **changes: object) -> Cluster:
    """Round-robin, except that the second request gets a donor."""
    run = cluster(trace, num_prefill=2, num_decode=2, **changes)
    place = run.gateway.policy.place

    def placed(request, hashes, *rest) -> Reservation:
        reservation = place(request, hashes, *rest)
        if request.request_id.endswith("1"):
            reservation.donor = candidate(run, donor)
            reservation.donor_blocks = num_blocks
        return reservation

    run.gateway.policy.place = placed
    return run


def candidate(run: Cluster, worker_id: str) -> Candidate:
    return next(m.candidate for m in run.gateway.members.values() if m.candidate.info.worker_id == worker_id)


@pytest.mark.parametrize("donor", ["prefill-0", "decode-0"])
def test_two_blocks_come_and_the_rest_is_computed(donor: str) -> None:
    run = with_donor(donor=donor)
    giving = []
    for at in (101.0, 102.5):
        run.events.at(at, lambda: giving.append(len(run.workers[donor].donations)))
    outcome = run.run()
    assert giving == [1, 0]
    job = run.jobs[1]
    # 20 bytes at 10 per second, then one chunk of 5 tokens: 2 + 1.5 s
    assert job.first_token_at - 100.0 == pytest.approx(3.5)
    assert (job.cached_tokens, job.fetched_tokens) == (20, 20)
    assert outcome.hit_ratio == outcome.fetched_ratio == pytest.approx(20 / 50)
    assert outcome.transferred_gb == pytest.approx((30 + 30 + 20) / 1e9)  # decode-1 held nothing
    run.check_integrity()


def test_what_was_fetched_is_there_for_the_next_one() -> None:
    trace = trace_of((0.0, [1, 2, 3], 25, 1), (100.0, [1, 2, 4], 25, 1), (200.0, [9], 5, 1), (300.0, [1, 2, 5], 25, 1))
    run = with_donor(trace=trace)
    run.run()
    assert run.jobs[3].attempt.source.info.worker_id == "prefill-1"
    assert (run.jobs[3].cached_tokens, run.jobs[3].fetched_tokens) == (20, 0)


def test_what_the_donor_does_not_hold_is_computed() -> None:
    run = with_donor(donor="decode-1")
    run.run()
    assert (run.jobs[1].cached_tokens, run.jobs[1].fetched_tokens) == (0, 0)
    assert run.jobs[1].first_token_at - 100.0 == pytest.approx(4.5)
    run.check_integrity()


def test_a_donor_that_dies_meanwhile_costs_what_it_did_not_send() -> None:
    run = with_donor(crashes=(Crash(worker_id="prefill-0", at_s=101.0, down_s=50.0),))
    outcome = run.run()
    assert (outcome.finished, outcome.retries) == (2, 0)
    assert run.jobs[1].fetched_tokens == 0
    assert run.jobs[1].first_token_at - 100.0 == pytest.approx(2.0 + 4.5)
    run.check_integrity()


def test_who_fetches_dies_and_the_donor_is_free() -> None:
    run = with_donor(crashes=(Crash(worker_id="prefill-1", at_s=101.0, down_s=50.0),))
    outcome = run.run()
    assert (outcome.finished, outcome.retries) == (2, 1)
    run.check_integrity()
    assert not any(len(worker.donations) for worker in run.workers.values())


def test_others_go_before_a_prompt_that_waits_for_its_blocks() -> None:
    trace = trace_of((0.0, [1, 2, 3], 25, 1), (100.0, [1, 2, 4], 25, 1), (100.1, [8], 5, 1), (100.2, [9], 5, 1))
    run = with_donor(trace=trace)  # the last one goes to prefill-1, too
    run.run()
    assert run.jobs[3].attempt.source is run.jobs[1].attempt.source
    assert run.jobs[3].first_token_at == pytest.approx(101.7)
    assert run.jobs[1].first_token_at == pytest.approx(103.5)


def test_a_full_worker_computes_instead() -> None:
    """Both decode workers' pages do not matter: prefill-1 has three, and a prompt of another kind is in them."""
    trace = trace_of((0.0, [1, 2, 3], 25, 1), (100.0, [1, 2, 4], 25, 1))
    run = with_donor(trace=trace, profile={"kv_tokens": 50})
    reader = run.workers["prefill-1"]
    run.events.at(99.0, reader.memory.cache.allocate, 4)
    run.events.at(101.0, lambda: reader.memory.release([0, 1, 2, 3]))
    run.events.at(101.0, reader._kick)
    run.run()
    assert run.jobs[1].fetched_tokens == 0
    assert run.jobs[1].first_token_at == pytest.approx(101.0 + 4.5)


SMALL = dataclasses.replace(QWEN3_32B_TPU7X, kv_tokens=200_000, prefill_rows=2, num_slots=8)
SHAPE = Shape(requests=250, rate_rps=9.0, think_s=5.0, output_tokens=60, max_input_tokens=60_000)


def busy_run(seed: int = 3, donors: bool = True, **changes: object) -> Cluster:
    trace = synthesize(SHAPE, 1)
    placement = PlacementConfig(donors=donors, local_prefill_tokens=0)
    scenario = dataclasses.replace(
        SCENARIO, policy="joint", placement=placement, profile=SMALL, num_prefill=3, num_decode=2, seed=seed, **changes
    )
    return Cluster(trace, hash_trace(trace), scenario)


def test_joint_placement_fetches_and_finds_more_with_it() -> None:
    run = busy_run()
    outcome = run.run()
    run.check_integrity()
    assert outcome.fetched_ratio > 0.01
    without = busy_run(donors=False).run()
    assert without.fetched_ratio == 0
    assert outcome.hit_ratio > without.hit_ratio
    assert run.gateway.transfers._rows.keys() == run.gateway.members.keys()  # links between all of them were measured


def test_same_seed_same_numbers() -> None:
    first, second = (dataclasses.asdict(busy_run().run()) for _ in range(2))
    del first["wall_s"], second["wall_s"]
    assert first == second


@pytest.mark.parametrize("seed", range(3))
def test_crashes_leave_nothing_behind(seed: int) -> None:
    crashes = tuple(
        Crash(worker_id=worker_id, at_s=4.0 + seed + 2.5 * number, down_s=2.0)
        for number, worker_id in enumerate(("prefill-0", "decode-1", "prefill-1", "prefill-2", "decode-0") * 2)
    )
    run = busy_run(seed, crashes=crashes, lost_events=0.2)
    outcome = run.run()
    assert outcome.finished == 250
    assert outcome.fetched_ratio > 0
    run.check_integrity()
    assert not any(len(worker.donations) for worker in run.workers.values())
