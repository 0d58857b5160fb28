"""The roofline, against sums done by hand."""

import pytest

from engine_core.aot.hlo import Collective
from engine_core.aot.roofline import PEAK, Assumptions, StepLoad, collective_seconds, step_seconds
from engine_core.aot.topology import find_topology


def load(**changed: float) -> StepLoad:
    return StepLoad(**{"matmul_flops": 0.0, "attention_flops": 0.0, "weight_bytes": 0.0, "kv_bytes": 0.0, **changed})


def test_memory_bound():
    seconds = step_seconds(load(weight_bytes=819e9, kv_bytes=819e9), {}, find_topology("v5e-1"), "bfloat16", PEAK)
    assert seconds == pytest.approx(2.0)


def test_compute_bound_and_shares():
    half = Assumptions(hbm_share=1.0, matmul_share=0.5, attention_share=0.25, hop_s=0.0, ring_links=2)
    asked = load(matmul_flops=918e12, attention_flops=918e12, weight_bytes=1.0)
    assert step_seconds(asked, {}, find_topology("v6e-1"), "bfloat16", half) == pytest.approx(2.0 + 4.0)


def test_an_all_reduce_passes_twice():
    """v6e: 400 GB/s over four links, two of them in a ring."""
    topology = find_topology("v6e-4")
    reduce = {"all-reduce": Collective(count=1, num_bytes=int(200e9), largest_bytes=0)}
    gather = {"all-gather": Collective(count=1, num_bytes=int(200e9), largest_bytes=0)}
    assert collective_seconds(reduce, topology, PEAK) == pytest.approx(2 * 3 / 4)
    assert collective_seconds(gather, topology, PEAK) == pytest.approx(3 / 4)


def test_latency_counts_hops():
    """2 x 4 chips: one hop along the short side, two along the long one."""
    slow = Assumptions(hbm_share=1.0, matmul_share=1.0, attention_share=1.0, hop_s=1.0, ring_links=2)
    ten = {"all-reduce": Collective(count=10, num_bytes=0, largest_bytes=0)}
    assert collective_seconds(ten, find_topology("v6e-8"), slow) == pytest.approx(10 * 2 * 3)


def test_one_device_has_no_collectives():
    one = {"all-reduce": Collective(count=10, num_bytes=10**9, largest_bytes=0)}
    assert collective_seconds(one, find_topology("v6e-1"), PEAK) == 0.0
