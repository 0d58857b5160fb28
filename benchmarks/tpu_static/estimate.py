"""From schedules to time: what a kernel's instructions take, against what its bytes take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.tpu_static.bundles import Loop, Schedule, ScheduleError, Work
from benchmarks.tpu_static.case import Case, Run
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
        main_kernel: the one that takes most cycles; the figures of the hot loop and of memory are its own.
        hot_cycles: of one pass of the hot loop's body as the case counts it, without loops in it. The hot loop is the
            one that takes most cycles in all.
        hot_use: by unit, share of its slots that is taken in that body.
        hot_dma_bytes: that one pass of that body starts to copy; None where a size is known only at run time.
        expected_dma_bytes: what the case says of them.
        hot_copies: from HBM to VMEM that one pass of that body starts.
        expected_copies: what the case says of them.
        copy_bytes: the sizes of copies from HBM to VMEM in loops, where they are fixed.
        expected_copy_bytes: what the case says of them.
        spills: vector registers that it stores for want of room.
        fills: and loads back.
        checks: bounds checks in it.
        vmatmuls: matrix products in it.
        vmem_bytes: allocated.
        smem_bytes: allocated.
        kernels: every kernel of the program, see `describe`.
    """

    compute_us: float
    hbm_us: float
    compute_over_hbm: float
    flops_share: float
    bandwidth_share: float
    main_kernel: str
    hot_cycles: int
    hot_use: dict[str, float]
    hot_dma_bytes: int | None
    expected_dma_bytes: int | None
    hot_copies: int
    expected_copies: int | None
    copy_bytes: list[int]
    expected_copy_bytes: int | None
    spills: int
    fills: int
    checks: int
    vmatmuls: int
    vmem_bytes: int
    smem_bytes: int
    kernels: list[dict[str, Any]]


def estimate(case: Case, schedules: Sequence[Schedule], generation: Generation) -> Estimate:
    """Add up the passes that the case counts.

    Raises:
        ScheduleError: there is no kernel, or the case does not know its loops or how often they run.
    """
    if not schedules:
        raise ScheduleError("the compiler wrote no schedule of a kernel")
    cycles = 0.0
    kernels = []
    for schedule in schedules:
        runs = list(case.runs(schedule))
        if len(runs) != len(schedule.loops):
            raise ScheduleError(f"{schedule.name} has {len(schedule.loops)} loops, the case counts {len(runs)}")
        total = sum(run.cycles * run.passes for run in runs) + schedule.outside.cycles
        cycles += total
        kernels.append(describe(schedule, runs) | {"total_cycles": total})
    compute = cycles / generation.clock_hz
    hbm = case.hbm_bytes / generation.hbm_bytes_per_s * generation.tensor_cores
    peak = generation.peak_flops(case.dtype) / generation.tensor_cores
    if compute < case.flops / peak:
        raise ScheduleError(
            f"the case counts cycles for {compute * 1e6:.0f} us, but its products alone take "
            f"{case.flops / peak * 1e6:.0f} us at the peak: a loop runs more often than it says"
        )
    main = max(zip(schedules, kernels, strict=True), key=lambda pair: float(pair[1]["total_cycles"]))[0]
    runs = list(case.runs(main))
    index = max(range(len(runs)), key=lambda i: runs[i].passes * runs[i].cycles, default=None)
    hot = None if index is None else main.loops[index]
    work = main.outside if hot is None else hot.own
    return Estimate(
        compute_us=compute * 1e6,
        hbm_us=hbm * 1e6,
        compute_over_hbm=compute / hbm,
        flops_share=case.flops / peak / max(compute, hbm),
        bandwidth_share=hbm / max(compute, hbm),
        main_kernel=main.name,
        hot_cycles=work.cycles if index is None else runs[index].cycles,
        hot_dma_bytes=_dma_bytes(work),
        expected_dma_bytes=case.pass_dma_bytes,
        hot_copies=len(_copies(work)),
        expected_copies=case.pass_copies,
        copy_bytes=sorted({size for loop in main.loops for size in _copies(loop.own) if size is not None}),
        expected_copy_bytes=case.copy_bytes,
        checks=work.checks,
        vmatmuls=work.vmatmuls,
        hot_use=main.occupancy(work),
        spills=work.spills,
        fills=work.fills,
        vmem_bytes=main.vmem_bytes,
        smem_bytes=main.smem_bytes,
        kernels=kernels,
    )


def describe(schedule: Schedule, runs: Sequence[Run]) -> dict[str, Any]:
    """A kernel as plain JSON: its memory, what runs once, and each loop."""
    return {
        "name": schedule.name,
        "cycles": schedule.cycles,
        "vmem_bytes": schedule.vmem_bytes,
        "smem_bytes": schedule.smem_bytes,
        "once": _work(schedule, schedule.outside),
        "loops": [_loop(schedule, loop, run) for loop, run in zip(schedule.loops, runs, strict=True)],
    }


def _loop(schedule: Schedule, loop: Loop, run: Run) -> dict[str, Any]:
    place = {"start": loop.start, "stop": loop.stop, "depth": loop.depth, "parent": loop.parent}
    regions = [{**asdict(region), "cycles": region.cycles} for region in loop.regions]
    ran = {"passes": run.passes, "pass_cycles": run.cycles}
    return {**place, **ran, **_work(schedule, loop.own), "regions": regions}


def _work(schedule: Schedule, work: Work) -> dict[str, Any]:
    use = schedule.occupancy(work)
    return {
        "cycles": work.cycles,
        "stalls": work.stalls,
        "use": {unit: round(share, 4) for unit, share in use.items()},
        "vmatmuls": work.vmatmuls,
        "spills": work.spills,
        "fills": work.fills,
        "dmas": [asdict(dma) for dma in work.dmas],
        "waits": work.waits,
        "checks": work.checks,
    }


def _copies(work: Work) -> list[int | None]:
    return [dma.num_bytes for dma in work.dmas if dma.direction == "hbm_to_vmem"]


def _dma_bytes(work: Work) -> int | None:
    sizes = [dma.num_bytes for dma in work.dmas]
    return None if None in sizes else sum(size or 0 for size in sizes)
