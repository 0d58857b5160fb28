"""From schedules to time: what a kernel's instructions take, against what its bytes take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.tpu_static.bundles import UNITS, Loop, Schedule, ScheduleError, Work
from benchmarks.tpu_static.case import Case
from engine_core.aot.generation import Generation


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One kernel at one shape on one TensorCore. A lower bound: no contention, no launch, every wait hidden.

    Attributes:
        compute_us: cycles of every pass of every loop, over the clock.
        hbm_us: bytes that must move, over the peak bandwidth.
        compute_over_hbm: below 1 the kernel can run at the speed of HBM.
        flops_share: of the peak, if it takes the larger of both times; 0 to 1.
        bandwidth_share: of the peak, likewise.
        spills, fills: of the hot loop's body.
        hot_cycles: of the hot loop's body, without loops in it.
        hot_use: by unit, share of its slots that is taken in that body.
        vmem_bytes, smem_bytes: of the largest kernel.
        kernels: every kernel of the program, see `describe`.
    """

    compute_us: float
    hbm_us: float
    compute_over_hbm: float
    flops_share: float
    bandwidth_share: float
    hot_cycles: int
    hot_use: dict[str, float]
    spills: int
    fills: int
    vmem_bytes: int
    smem_bytes: int
    kernels: list[dict[str, Any]]


def estimate(case: Case, schedules: Sequence[Schedule], generation: Generation) -> Estimate:
    """Add up the passes that the case counts.

    Raises:
        ScheduleError: there is no kernel, or the case does not know its loops.
    """
    if not schedules:
        raise ScheduleError("the compiler wrote no schedule of a kernel")
    cycles = 0.0
    kernels = []
    for schedule in schedules:
        passes = list(case.passes(schedule))
        if len(passes) != len(schedule.loops):
            raise ScheduleError(f"{schedule.name} has {len(schedule.loops)} loops, the case counts {len(passes)}")
        own = sum(loop.own.cycles * count for loop, count in zip(schedule.loops, passes, strict=True))
        cycles += own + schedule.outside.cycles
        kernels.append(describe(schedule, passes))
    compute = cycles / generation.clock_hz
    hbm = case.hbm_bytes / generation.hbm_bytes_per_s * generation.tensor_cores
    peak = generation.peak_flops(case.dtype) / generation.tensor_cores
    main = max(schedules, key=lambda schedule: schedule.cycles)
    hot = main.hot_loop()
    work = main.outside if hot is None else hot.own
    return Estimate(
        compute_us=compute * 1e6,
        hbm_us=hbm * 1e6,
        compute_over_hbm=compute / hbm,
        flops_share=case.flops / peak / max(compute, hbm),
        bandwidth_share=hbm / max(compute, hbm),
        hot_cycles=work.cycles,
        hot_use=main.occupancy(work),
        spills=work.spills,
        fills=work.fills,
        vmem_bytes=max(schedule.vmem_bytes for schedule in schedules),
        smem_bytes=max(schedule.smem_bytes for schedule in schedules),
        kernels=kernels,
    )


def describe(schedule: Schedule, passes: Sequence[float]) -> dict[str, Any]:
    """A kernel as plain JSON: its memory, what runs once, and each loop."""
    return {
        "name": schedule.name,
        "cycles": schedule.cycles,
        "vmem_bytes": schedule.vmem_bytes,
        "smem_bytes": schedule.smem_bytes,
        "once": _work(schedule, schedule.outside),
        "loops": [_loop(schedule, loop, count) for loop, count in zip(schedule.loops, passes, strict=True)],
    }


def _loop(schedule: Schedule, loop: Loop, passes: float) -> dict[str, Any]:
    place = {"start": loop.start, "stop": loop.stop, "depth": loop.depth, "parent": loop.parent, "passes": passes}
    regions = [{**asdict(region), "cycles": region.cycles} for region in loop.regions]
    return {**place, **_work(schedule, loop.own), "regions": regions}


def _work(schedule: Schedule, work: Work) -> dict[str, Any]:
    use = schedule.occupancy(work)
    return {
        "cycles": work.cycles,
        "stalls": work.stalls,
        "use": {unit: round(use[unit], 4) for unit in UNITS},
        "vmatmuls": work.vmatmuls,
        "spills": work.spills,
        "fills": work.fills,
        "dmas": [asdict(dma) for dma in work.dmas],
        "waits": work.waits,
        "checks": work.checks,
    }
