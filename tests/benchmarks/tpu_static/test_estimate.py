"""What an estimate refuses to believe."""

import pytest

from benchmarks.tpu_static.bundles import UNITS, Loop, Schedule, ScheduleError, Work
from benchmarks.tpu_static.case import Case, only_loop
from benchmarks.tpu_static.estimate import estimate
from benchmarks.tpu_static.kernels.peer_grouped import ragged_dot
from engine_core.aot.generation import GENERATIONS
from engine_core.errors import ConfigError

V6E = GENERATIONS["v6e"]


def estimate_of(passes, flops):
    """A kernel of one loop with a body of 1000 cycles."""
    use = dict.fromkeys(UNITS, 0)
    body = Work(cycles=1000, stalls=0, use=use, vmatmuls=64, dmas=(), waits=0, checks=0)
    outside = Work(cycles=0, stalls=0, use=use, vmatmuls=0, dmas=(), waits=0, checks=0)
    schedule = Schedule(
        name="kernel",
        cycles=1000,
        capacity=dict.fromkeys(UNITS, 1),
        loops=(Loop(start=0, stop=1000, depth=0, parent=None, own=body, regions=()),),
        outside=outside,
        vmem_bytes=0,
        smem_bytes=0,
    )
    case = Case(
        function=lambda: None,
        arguments=(),
        donate=(),
        flops=flops,
        hbm_bytes=1.0,
        dtype="bfloat16",
        pass_dma_bytes=None,
        runs=only_loop(passes),
    )
    return estimate(case, [schedule], V6E)


def test_no_kernel_is_faster_than_the_peak():
    per_cycle = V6E.bf16_flops / V6E.clock_hz
    assert estimate_of(10, 9999 * per_cycle).flops_share == pytest.approx(0.9999)
    with pytest.raises(ScheduleError, match="counts cycles for 6 us, but its products alone take 11 us at the peak"):
        estimate_of(10, 20000 * per_cycle)


@pytest.mark.parametrize("generation", ["v5e", "v5p"])
def test_passes_that_are_not_known_are_not_guessed(generation):
    with pytest.raises(ConfigError, match=f"how often its loop runs on {generation} is not known"):
        ragged_dot(GENERATIONS[generation], "qwen3-30b-a3b-up-decode")
