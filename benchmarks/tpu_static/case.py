"""What to compile and what it is worth: a kernel's call at one shape, its bytes and FLOPs, how often its loops run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tpu_static.bundles import Loop, Schedule, ScheduleError
from engine_core.aot.generation import Generation


@dataclass(frozen=True, slots=True)
class Run:
    """How one loop runs at the case's shape.

    Attributes:
        passes: of its body, in all.
        cycles: of one pass, without the loops in it.
    """

    passes: float
    cycles: int


Runs = Callable[[Schedule], Sequence[Run]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kernel at one shape.

    Attributes:
        function: to be jitted; a Python callable of `arguments`.
        arguments: `jax.ShapeDtypeStruct` (or pytrees of them) of one device.
        donate: indices of donated arguments.
        flops: products and sums that the operation needs (2 M N K of a matmul), not those the kernel wastes.
        hbm_bytes: that the operation must move at the least.
        dtype: of the products' operands; the peak that utilisation is measured against.
        pass_dma_bytes: that one pass of the hot body must copy, by its tiles' sizes; None where run-time sizes decide.
        pass_copies: from HBM to VMEM that one pass of the hot body must start; None: not said.
        copy_bytes: of each copy from HBM to VMEM in the main kernel's loops whose size is fixed; None: not said.
        runs: given one compiled kernel, a `Run` for each of its loops, in their order. Several kernels in one program
            are each asked for, and so are XLA's own fusions around them.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...]
    flops: float
    hbm_bytes: float
    dtype: str
    pass_dma_bytes: int | None
    runs: Runs
    pass_copies: int | None = None
    copy_bytes: int | None = None


Builder = Callable[[Generation, str], Case]


def once(schedule: Schedule) -> Sequence[Run]:
    """Every loop passed once: XLA's own fusions, whose grids are not known."""
    return [Run(1.0, loop.own.cycles) for loop in schedule.loops]


def idle(schedule: Schedule) -> Sequence[Run]:
    """No pass of any loop: a kernel that is called for nothing."""
    return [Run(0.0, loop.own.cycles) for loop in schedule.loops]


def by_name(prefixes: Mapping[str, Runs]) -> Runs:
    """The first entry that the kernel's name starts with; `once` where there is none."""

    def runs(schedule: Schedule) -> Sequence[Run]:
        return next((found for prefix, found in prefixes.items() if schedule.name.startswith(prefix)), once)(schedule)

    return runs


def only_loop(passes: float) -> Runs:
    """A kernel with one loop: its grid."""

    def runs(schedule: Schedule) -> Sequence[Run]:
        if len(schedule.loops) != 1:
            raise ScheduleError(f"{schedule.name} has {len(schedule.loops)} loops, not one")
        return [Run(passes, schedule.loops[0].own.cycles)]

    return runs


def hot_chain(passes: Sequence[float], side_trips: float) -> Runs:
    """Nested loops.

    Args:
        passes: of the bodies in all, from the outermost loop to the hot one (`Schedule.hot_loop`).
        side_trips: passes of every other loop for each pass of the loop around it (of the kernel where it is
            outermost).
    """

    def runs(schedule: Schedule) -> Sequence[Run]:
        chain = chain_of(schedule)
        if len(chain) != len(passes):
            loops = ", ".join(f"{loop.start}-{loop.stop}" for loop in schedule.loops)
            raise ScheduleError(
                f"{schedule.name}: its hot loop is {len(chain)} deep, not {len(passes)} (loops {loops})"
            )
        result: list[Run] = []
        for loop in schedule.loops:
            around = 1.0 if loop.parent is None else result[loop.parent].passes
            place = next((i for i, link in enumerate(chain) if link is loop), None)
            result.append(Run(around * side_trips if place is None else passes[place], loop.own.cycles))
        return result

    return runs


def chain_of(schedule: Schedule) -> list[Loop]:
    """The hot loop and those around it, the outermost first."""
    chain: list[Loop] = []
    loop = schedule.hot_loop()
    while loop is not None:
        chain.insert(0, loop)
        loop = None if loop.parent is None else schedule.loops[loop.parent]
    return chain
