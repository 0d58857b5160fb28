import dataclasses

import pytest

from router.placement import PlacementConfig
from router.simulator.autoscale import planner_config, play, play_static
from router.simulator.outcome import Slo
from router.simulator.profile import QWEN3_32B_TPU7X
from router.simulator.synthesis import Shape, synthesize
from tests.router.simulator.cases import SCENARIO

TRACE = synthesize(Shape(requests=400, rate_rps=1.0, output_tokens=60, max_input_tokens=40_000), 0)
SCENE = dataclasses.replace(
    SCENARIO,
    policy="joint",
    placement=PlacementConfig(),
    profile=dataclasses.replace(QWEN3_32B_TPU7X, start_s=30.0),
    slo=Slo(ttft_s=5.0, itl_s=0.05),
    max_wait_s=60.0,
)


def test_a_fixed_fleet_that_keeps_up_is_paid_for_the_whole_trace():
    fleet = play_static(TRACE, SCENE, 0.95, 0.95)
    assert not fleet.gave_up
    assert fleet.windows_met == 1.0
    assert fleet.slice_hours == pytest.approx(2 * TRACE.requests[-1].arrival_s / 3600)


def test_a_fixed_fleet_that_cannot_keep_up_is_given_up():
    slow = {"prefill-0": 30.0, "decode-0": 30.0}
    fleet = play_static(TRACE, dataclasses.replace(SCENE, speeds=slow), 0.95, 0.95)
    assert fleet.gave_up
    assert 0.5 < fleet.windows_met < 0.95  # it ended with the first windows that were lost


def test_the_planner_pays_for_what_it_ordered():
    bill, outcome = play(TRACE, dataclasses.replace(SCENE, num_prefill=2, num_decode=2), planner_config(SCENE, 8, 0.0))
    assert outcome.finished == 400
    assert bill.windows_met == 1.0
    assert 2 <= bill.slice_hours * 3600 / TRACE.requests[-1].arrival_s < 4  # this load needs two, not four
    assert bill.plans
