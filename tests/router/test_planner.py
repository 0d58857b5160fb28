import dataclasses
import itertools
import math
import random

import pytest

from engine_core.errors import ConfigError
from engine_core.types import Role
from router.forecast import Forecast
from router.planner import Observation, Planner, PlannerConfig, SliceSample
from router.pool_model import DecodeCosts, decode_state, mean_costs, smoothed, spare_share, ttft_attainment

COSTS = DecodeCosts(step_s=0.005, row_s=1e-4, token_s=1e-8, num_slots=64, kv_tokens=1_000_000)
CONFIG = PlannerConfig(
    ttft_s=2.0, itl_s=0.02, start_s=60.0, cooldown_s=60.0, max_prefill=20, max_decode=20, budget=30, local_share=0.0
)


def seen(at, rate, prefill, decode, **changes):
    """A window of `CONFIG.window_s` with warm slices and requests of 0.4 s, 300 tokens behind 4000."""
    samples = [SliceSample(role=Role.PREFILL, age_s=1e3, kv_share=0.1) for _ in range(prefill)]
    samples += [SliceSample(role=Role.DECODE, age_s=1e3, kv_share=0.1) for _ in range(decode)]
    fields = {
        "at": at,
        "requests": round(rate * CONFIG.window_s),
        "service_s": [0.4] * 20,
        "output_tokens": 300.0,
        "context_tokens": 4000.0,
        "ttft_met": 1.0,
        "itl_met": 1.0,
        "slices": samples,
        "starting": {},
        "transfer_s": 0.0,
        "decode": COSTS,
    }
    return Observation(**{**fields, **changes})


def follow(planner, rates, prefill=2, decode=2, **changes):
    """Do at once what the planner says, window after window; the plans."""
    plans = []
    for i, rate in enumerate(rates):
        plan = planner.plan(seen(15.0 * (i + 1), rate, prefill, decode, **changes))
        prefill, decode = plan.prefill, plan.decode
        plans.append(plan)
    return plans


def test_waiting_model_agrees_with_erlang_for_one_server():
    """M/M/1: a request of mean service 1 waits at all with probability rho."""
    rng = random.Random(0)
    service = [rng.expovariate(1.0) for _ in range(20_000)]
    short = [one for one in service if one < 1e-3]
    assert ttft_attainment(service, 0.6, 1.0, 1e9) == pytest.approx(1.0)
    # of those that take no time themselves, within 2 s: 1 - rho exp(-(1 - rho) 2)
    waits = 1 - 0.6 * math.exp(-0.4 * 2)
    mean, variance = 1.0, 1.0
    assert mean == variance  # what makes the M/G/1 formula the M/M/1 one
    per_request = [ttft_attainment([*service, one], 0.6, 1.0, 2.0) for one in short[:1]]
    assert per_request[0] < waits
    assert ttft_attainment([1.0] * 10, 0.6, 1.0, 1.0 - 1e-9) == 0.0


def test_attainment_grows_with_servers_and_falls_with_rate():
    rng = random.Random(1)
    service = [rng.lognormvariate(-1, 1) for _ in range(500)]
    by_servers = [ttft_attainment(service, 5.0, servers, 3.0) for servers in range(1, 12)]
    assert by_servers == sorted(by_servers)
    by_rate = [ttft_attainment(service, rate / 2, 4, 3.0) for rate in range(1, 20)]
    assert by_rate == sorted(by_rate, reverse=True)
    assert ttft_attainment([], 5.0, 1, 3.0) == 1.0


def test_decode_state_is_a_fixed_point():
    state = decode_state(COSTS, 10.0, 300.0, 4000.0, 2, 0.0)
    assert state.rows == pytest.approx(5.0 * 300.0 * COSTS.seconds(state.rows, 4000.0))
    assert state.itl_s == pytest.approx(COSTS.seconds(state.rows, 4000.0))
    assert decode_state(COSTS, 1000.0, 300.0, 4000.0, 1, 0.0).itl_s == math.inf


def test_forecast_follows_a_ramp_and_knows_its_error():
    forecast = Forecast(8)
    for i in range(200):
        forecast.add(10.0 + 0.5 * i)
    assert forecast.ahead() > forecast.level + 2
    flat, noisy = Forecast(8), Forecast(8)
    rng = random.Random(0)
    for _ in range(300):
        flat.add(10.0)
        noisy.add(rng.gauss(10.0, 2.0))
    assert flat.upper(1.0) == pytest.approx(10.0)
    assert 1.5 < noisy.deviation < 3.0
    assert Forecast(8).upper(1.0) == 0.0


def test_forecast_is_proven_when_some_of_it_has_come_true():
    forecast = Forecast(4)
    proven = []
    for _ in range(10):
        forecast.add(5.0)
        proven.append(forecast.is_proven)
    assert proven == [False] * 7 + [True] * 3


def test_forecast_believes_a_slow_eye_in_noise_and_a_quick_one_in_a_load_that_turns():
    rng = random.Random(0)
    steady, turning = Forecast(9), Forecast(9)
    said, true = [], []
    for i in range(400):
        steady.add(rng.gauss(10.0, 2.0))
        turning.add(10.0 + 6.0 * math.sin(i / 12))
        said.append((steady.ahead(), turning.ahead()))
        true.append(10.0 + 6.0 * math.sin((i + 9) / 12))
    of_noise = [one for one, _ in said[100:]]
    assert max(of_noise) - min(of_noise) < 8.0  # of a quick one alone they swing by 18
    errors = [abs(one - want) for (_, one), want in zip(said[100:], true[100:], strict=True)]
    assert sum(errors) / len(errors) < 2.2  # a slow one alone is off by 3 to 5


def test_floor_jumps_when_the_load_does():
    plans = follow(Planner(CONFIG), [4.0] * 10 + [20.0] * 6)
    assert plans[9].prefill <= 4
    assert plans[-1].prefill >= 9  # 20 x 0.4 s are 8 slices all the time busy
    assert "the floor is" in " ".join(plans[10].reasons)


def test_scale_down_is_slow_and_stops_where_the_objective_would_be_missed():
    plans = follow(Planner(CONFIG), [4.0] * 200, prefill=12, decode=8)
    counts = [plan.prefill for plan in plans]
    assert all(before - after <= 1 for before, after in itertools.pairwise(counts))
    changes = [i for i in range(1, len(counts)) if counts[i] != counts[i - 1]]
    assert all(later - earlier >= 4 for earlier, later in itertools.pairwise(changes))  # 60 s
    final = plans[-1].prefill
    assert ttft_attainment([0.4] * 100, 4.0, final, CONFIG.ttft_s) >= CONFIG.attainment
    assert ttft_attainment([0.4] * 100, 4.0, final - 1, CONFIG.ttft_s) < CONFIG.attainment


def test_steady_load_does_not_oscillate():
    rng = random.Random(0)
    plans = follow(Planner(CONFIG), [max(0.0, rng.gauss(8.0, 0.7)) for _ in range(400)])
    counts = [plan.prefill + plan.decode for plan in plans[60:]]
    turns = sum(a != b for a, b in itertools.pairwise(counts))
    assert turns <= 20
    assert max(counts) - min(counts) <= 2


def test_missed_objective_adds_one_slice_after_two_windows_and_then_cools_down():
    planner = Planner(CONFIG)
    calm = follow(planner, [4.0] * 16)[-1]
    counts = [
        planner.plan(seen(15.0 * i, 4.0, calm.prefill, calm.decode, ttft_met=0.5)).prefill - calm.prefill
        for i in range(17, 21)
    ]
    assert counts[0] == 0
    assert counts[1:].count(1) == 1


def test_missed_itl_and_full_memory_are_the_decode_pools():
    for changes in ({"itl_met": 0.5}, {"slices": None}):
        planner = Planner(CONFIG)
        calm = follow(planner, [4.0] * 16)[-1]
        if changes.get("slices", 1) is None:
            full = [SliceSample(role=Role.DECODE, age_s=1e3, kv_share=0.95) for _ in range(calm.decode)]
            full += [SliceSample(role=Role.PREFILL, age_s=1e3, kv_share=0.1) for _ in range(calm.prefill)]
            changes = {"slices": full}
        plans = [planner.plan(seen(15.0 * i, 4.0, calm.prefill, calm.decode, **changes)) for i in range(17, 20)]
        assert max(plan.decode for plan in plans) == calm.decode + 1
        assert max(plan.prefill for plan in plans) == calm.prefill


def test_cold_slices_are_not_heard():
    planner = Planner(CONFIG)
    calm = follow(planner, [4.0] * 16)[-1]
    cold = [SliceSample(role=Role.DECODE, age_s=1.0, kv_share=0.99) for _ in range(calm.decode)]
    warm = [SliceSample(role=Role.PREFILL, age_s=1e3, kv_share=0.1) for _ in range(calm.prefill)]
    for i in range(17, 22):
        plan = planner.plan(seen(15.0 * i, 4.0, calm.prefill, calm.decode, slices=[*warm, *cold]))
        assert plan.decode == calm.decode


@pytest.mark.parametrize("seed", range(20))
def test_bounds_and_budget_always_hold(seed):
    rng = random.Random(seed)
    config = dataclasses.replace(
        CONFIG, min_prefill=2, max_prefill=7, min_decode=3, max_decode=6, budget=rng.randint(5, 13), flip_s=10.0
    )
    planner = Planner(config)
    prefill, decode = 2, 3
    for i in range(120):
        met = {"ttft_met": rng.random(), "itl_met": rng.random(), "transfer_s": rng.random() / 5}
        plan = planner.plan(seen(15.0 * i, rng.choice([0.0, 3.0, 100.0]), prefill, decode, **met))
        assert 2 <= plan.prefill <= 7
        assert 3 <= plan.decode <= 6
        assert plan.prefill + plan.decode <= config.budget
        assert plan.reasons
        prefill, decode = plan.prefill, plan.decode


def test_flip_is_proposed_where_one_pool_starves_and_the_other_idles():
    config = dataclasses.replace(CONFIG, flip_s=10.0)
    plan = follow(Planner(config), [4.0] * 20, prefill=3, decode=9)[4]
    assert plan.flips == ()
    planner = Planner(config)
    follow(planner, [4.0] * 12, prefill=3, decode=9)
    jump = planner.plan(seen(15.0 * 40, 12.0, 3, 9))
    assert jump.flips == ((Role.DECODE, Role.PREFILL),)
    assert "make a decode slice a prefill slice" in jump.advise(3, 9)


def test_decode_slices_that_read_prompts_are_kept_while_prefill_needs_them():
    config = dataclasses.replace(CONFIG, local_share=0.8, min_prefill=3, max_prefill=3, itl_s=0.05)
    kept = follow(Planner(config), [8.0] * 60, prefill=3, decode=8)[-1]
    alone = follow(Planner(dataclasses.replace(config, local_share=0.0)), [8.0] * 60, prefill=3, decode=8)[-1]
    assert kept.prefill == alone.prefill == 3
    assert kept.decode > alone.decode  # 8 x 0.4 s are more than three slices can read


def test_nothing_is_taken_away_before_a_forecast_has_come_true():
    plans = follow(Planner(CONFIG), [0.5] * 20, prefill=4, decode=4)
    first = next(i for i, plan in enumerate(plans) if plan.prefill < 4)
    assert first >= 9  # it looks five windows ahead, and five such looks have to be judged


def test_spare_time_of_decode_slices_falls_with_what_they_decode():
    spare = [spare_share(COSTS, rate, 300.0, 4000.0, 2, 0.05) for rate in (0.0, 4.0, 8.0, 100.0)]
    per_s = 300.0 * (COSTS.row_s + 4000.0 * COSTS.token_s) / 2
    assert spare == pytest.approx([0.9, 0.9 - 4 * per_s, 0.9 - 8 * per_s, 0.0])
    assert spare_share(COSTS, 1.0, 300.0, 4000.0, 0, 0.05) == 0.0


def test_costs_are_those_of_all_slices_and_change_slowly():
    one, other = COSTS, dataclasses.replace(COSTS, step_s=0.007, token_s=2e-8)
    mean = mean_costs([one, other])
    assert (mean.step_s, mean.token_s) == pytest.approx((0.006, 1.5e-8))
    assert smoothed(None, other, 0.1) == other
    assert smoothed(one, other, 0.1).step_s == pytest.approx(0.0052)


def test_network_of_decode_slices_counts():
    slow = follow(Planner(CONFIG), [8.0] * 20, transfer_s=0.5)[-1]
    fast = follow(Planner(CONFIG), [8.0] * 20, transfer_s=0.01)[-1]
    assert slow.decode >= 6 > fast.decode


def test_advice_says_what_and_why():
    plan = follow(Planner(CONFIG), [4.0] * 4 + [20.0])[-1]
    text = plan.advise(2, 2)
    assert text.startswith(f"2P2D -> {plan.prefill}P{plan.decode}D: start {plan.prefill - 2} prefill")
    assert "are expected" in text
    assert plan.advise(plan.prefill, plan.decode).splitlines()[0].endswith("leave it")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"cooldown_s": 10.0}, "cooldown_s"),
        ({"budget": 1}, "budget"),
        ({"min_prefill": 30}, "min_prefill"),
        ({"min_decode": 0}, "min_decode"),
        ({"ttft_s": 0.0}, "ttft_s"),
        ({"attainment": 1.5}, "attainment"),
    ],
)
def test_configurations_that_cannot_be(change, name):
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(CONFIG, **change)
