import dataclasses

import pytest

from engine_core.errors import ConfigError
from router.placement import PlacementConfig
from router.simulator.cluster import Cluster, Crash, hash_trace
from router.simulator.oracle import hit_ratio
from router.simulator.policies import POLICIES, Reservation
from router.simulator.profile import QWEN3_32B_TPU7X
from router.simulator.synthesis import Shape, synthesize
from tests.router.simulator.cases import PROFILE, SCENARIO, cluster, trace_of

SMALL = dataclasses.replace(QWEN3_32B_TPU7X, kv_tokens=200_000, prefill_rows=2, num_slots=8)
SHAPE = Shape(requests=150, rate_rps=6.0, think_s=5.0, output_tokens=60, max_input_tokens=60_000)


def synthetic(seed=1, **changes):
    trace = synthesize(SHAPE, seed)
    scenario = dataclasses.replace(
        SCENARIO, policy="joint", profile=SMALL, num_prefill=2, num_decode=2, seed=3, **changes
    )
    return Cluster(trace, hash_trace(trace), scenario)


def test_one_request_by_hand():
    """25 tokens in chunks of 20 and 5: 1 + 2 and 1 + 0.5 s. Two blocks fly while the second chunk runs."""
    run = cluster(trace_of((0.0, [1, 2, 3], 25, 3)))
    run.run()
    (job,) = run.jobs
    assert job.first_token_at == pytest.approx(4.5)
    # 20 bytes leave at 3.0 and take 2 s, 10 more follow at 5.0: landed at 6.0, then two steps of 0.75 s
    assert job.last_token_at == pytest.approx(7.5)
    assert job.mean_itl_s == pytest.approx(1.5)


def test_gaps_count_the_hand_over():
    run = cluster(trace_of((0.0, [1, 2, 3], 25, 3)))
    outcome = run.run()
    assert outcome.itl_p99_ms == pytest.approx(2250.0)  # 6.0 + 0.75 - 4.5
    assert outcome.itl_p50_ms == pytest.approx(750.0)


def test_second_request_hits_what_the_first_left():
    run = cluster(trace_of((0.0, [1, 2, 3], 25, 1), (100.0, [1, 2, 4], 25, 1)))
    outcome = run.run()
    assert run.jobs[1].cached_tokens == 20
    assert run.jobs[1].first_token_at - 100.0 == pytest.approx(1.5)  # one chunk of 5 tokens
    assert outcome.hit_ratio == pytest.approx(20 / 50)
    assert outcome.transferred_gb == pytest.approx((30 + 10) / 1e9)  # the target lacks the last block only


def test_last_token_is_computed_even_if_all_blocks_are_held():
    run = cluster(trace_of((0.0, [1, 2], 20, 1), (100.0, [1, 2], 20, 1)))
    run.run()
    assert run.jobs[1].cached_tokens == 10


def test_prompts_in_a_queue_find_what_those_before_them_left():
    """Both come at once; the second gets its pages when its turn has come."""
    run = cluster(trace_of((0.0, [1, 2, 3], 25, 1), (0.0, [1, 2, 4], 25, 1)))
    run.run()
    assert [job.cached_tokens for job in run.jobs] == [0, 20]


@pytest.mark.parametrize("seed", [1, 2])
def test_joint_placement_hits_nearly_what_one_cache_would(seed):
    """40 system prompts of 16 blocks, more than one worker's cache holds beside what runs: each needs a home."""
    trace = synthesize(Shape(requests=400, turns=1, system_tokens=8192, system_prompts=40, zipf=1.0), seed)
    profile = dataclasses.replace(QWEN3_32B_TPU7X, kv_tokens=150_000)
    trace = trace.scaled(4.0 / 8.0)
    scenario = dataclasses.replace(SCENARIO, policy="joint", profile=profile, num_prefill=2, num_decode=2)
    outcome = Cluster(trace, hash_trace(trace), scenario).run()
    assert outcome.hit_ratio > 0.9 * hit_ratio(trace, 2 * profile.kv_tokens // 512)


def test_batch_of_two_steps_together():
    """Prompts are read in one step each: 1 + 1 s. The first decodes alone, then both."""
    run = cluster(trace_of((0.0, [1], 10, 5), (0.0, [2], 10, 3)), {"link_bytes_per_s": 1e12, "chunk_tokens": 10})
    run.run()
    first, second = run.jobs
    assert (first.first_token_at, second.first_token_at) == pytest.approx((2.0, 4.0))
    # alone from 2.0: steps of 0.75 end at 2.75, 3.5, 4.25; from there both, 1.0 each
    assert first.last_token_at == pytest.approx(5.25)
    # the second still has two tokens to go: one with the first, one alone
    assert second.last_token_at == pytest.approx(6.0)


def test_steps_take_longer_as_the_sequence_grows():
    """Attending to 11, 12 and 13 tokens, the last of them after a new page, at 0.1 s each beside 0.75 s."""
    profile = {"decode_token_s": 0.1, "link_bytes_per_s": 1e12}
    run = cluster(trace_of((0.0, [1], 10, 4)), profile)
    run.run()
    assert run.jobs[0].last_token_at - run.jobs[0].first_token_at == pytest.approx(3 * 0.75 + 0.1 * (11 + 12 + 13))
    run.check_integrity()


def test_local_prefill_shares_rounds_with_decoding():
    trace = trace_of((0.0, [1], 10, 4), (1.0, [2, 3], 20, 1))
    run = cluster(trace, {"chunk_tokens": 10}, policy="joint", num_prefill=0)
    run.run()
    first, second = run.jobs
    assert first.first_token_at == pytest.approx(2.0)
    # from 2.0 on, rounds of a chunk (2 s) and a step (0.75 s) until the second prompt is read; one more step
    assert second.first_token_at == pytest.approx(7.5)
    assert first.last_token_at == pytest.approx(8.25)


class LocalReservation(Reservation):
    """Of a request whose decode worker reads its prompt."""

    def __init__(self, placed: Reservation) -> None:
        placed.release(0.0)
        self.prefill, self.decode, self.donor, self.donor_blocks = None, placed.decode, None, 0

    def release_prefill(self, now: float) -> None: ...

    def release(self, now: float) -> None: ...


@pytest.mark.parametrize("first", [True, False])
def test_later_landings_do_not_overtake_a_prompt_that_waits_for_pages(first):
    long, short = ([7] * 8, 75, 2), ([8], 10, 2)
    second, third = (long, short) if first else (short, long)
    run = cluster(trace_of((0.0, [1, 2, 3], 25, 40), (6.0, *second), (6.5, *third)), profile={"kv_tokens": 100})
    place = run.gateway.policy.place

    def placed(request, *rest):
        reservation = place(request, *rest)
        return LocalReservation(reservation) if request.num_prompt_tokens == long[1] else reservation

    run.gateway.policy.place = placed
    run.run()
    running, long_one = run.jobs[0], run.jobs[1 if first else 2]
    assert long_one.first_token_at > running.last_token_at
    assert (run.jobs[2 if first else 1].last_token_at > running.last_token_at) is first
    run.check_integrity()


def test_preemption_ends_and_leaves_nothing():
    trace = trace_of(*((0.0, [i], 10, 30) for i in range(4)))
    run = cluster(trace, {"kv_tokens": 70, "link_bytes_per_s": 1e9})
    outcome = run.run()
    assert outcome.preemptions > 0
    assert outcome.finished == 4
    run.check_integrity()


def test_same_seed_same_numbers():
    first, second = (dataclasses.asdict(synthetic().run()) for _ in range(2))
    assert first.pop("wall_s") > 0
    assert second.pop("wall_s") > 0
    assert first == second


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_under_any_policy(policy):
    run = synthetic()
    run = Cluster(run._trace, hash_trace(run._trace), dataclasses.replace(run.scenario, policy=policy))
    outcome = run.run()
    assert outcome.finished == 150
    assert all(job.generated == job.num_output for job in run.jobs)
    run.check_integrity()


@pytest.mark.parametrize("seed", range(6))
def test_crashes_and_lost_events_lose_no_request(seed):
    crashes = (
        Crash(worker_id="prefill-0", at_s=4.0 + seed, down_s=3.0),
        Crash(worker_id="decode-1", at_s=6.0, down_s=2.0),
        Crash(worker_id="decode-0", at_s=7.0 + seed / 2, down_s=5.0),
        Crash(worker_id="prefill-1", at_s=7.0, down_s=1.0),
        Crash(worker_id="decode-1", at_s=14.0, down_s=2.0),
        Crash(worker_id="decode-0", at_s=18.0, down_s=2.0),
        Crash(worker_id="decode-1", at_s=22.0, down_s=2.0),
    )
    run = synthetic(seed=seed, crashes=crashes, lost_events=0.2)
    outcome = run.run()
    assert outcome.finished == 150
    assert outcome.retries > 0
    assert all(job.generated == job.num_output for job in run.jobs)
    run.check_integrity()


def test_drained_worker_leaves_when_it_is_empty():
    run = synthetic()
    run.events.at(5.0, run.drain_worker, "decode-0")
    run.run()
    assert "decode-0" not in run.workers
    assert [worker.info.worker_id for worker in run.gone] == ["decode-0"]
    assert run.gone[0].ended_at > 5.0
    run.check_integrity()


def test_impatient_requests_are_refused_under_overload():
    run = synthetic(max_wait_s=0.5)
    run = Cluster(
        run._trace.scaled(0.02),
        hash_trace(run._trace),
        dataclasses.replace(run.scenario, placement=dataclasses.replace(run.scenario.placement, max_backlog_s=0.1)),
    )
    outcome = run.run()
    assert outcome.refused > 0
    assert outcome.refused + outcome.finished == 150
    run.check_integrity()


def test_too_long_a_request_is_named():
    with pytest.raises(ConfigError, match="request 1 has 1100 tokens"):
        cluster(trace_of((0.0, [1], 10, 5), (0.0, range(100), 1000, 100)), num_prefill=1)


def test_slow_worker_gets_less_under_joint_placement():
    run = synthetic(speeds={"prefill-0": 4.0}, placement=PlacementConfig(local_prefill_tokens=0))
    run.run()
    read = [job.attempt.source.info.worker_id for job in run.jobs]
    assert 0 < read.count("prefill-0") < 0.35 * read.count("prefill-1")


def test_profile_of_the_cases_is_what_the_comments_say():
    assert PROFILE.prefill_s(25, 0) == pytest.approx(4.5)
    assert PROFILE.decode_s(2, 0) == pytest.approx(1.0)
