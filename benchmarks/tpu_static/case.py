"""What to compile and what it is worth: a kernel's call at one shape, its bytes and FLOPs, how often its loops run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tpu_static.bundles import Schedule, ScheduleError
from engine_core.aot.generation import Generation

Passes = Callable[[Schedule], Sequence[float]]


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
        passes: given one compiled kernel, how often each of its loops' bodies runs, in the order of its loops. Several
            kernels in one program are each asked for.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...]
    flops: float
    hbm_bytes: float
    dtype: str
    passes: Passes


Builder = Callable[[Generation, str], Case]


def only_loop(count: float) -> Passes:
    """Passes of a kernel with one loop: its grid."""

    def passes(schedule: Schedule) -> Sequence[float]:
        if len(schedule.loops) != 1:
            raise ScheduleError(f"{schedule.name} has {len(schedule.loops)} loops, not one")
        return [count]

    return passes


def hot_chain(counts: Sequence[float], side_trips: float) -> Passes:
    """Passes of nested loops.

    Args:
        counts: how often the bodies run in all, from the outermost loop to the hot one.
        side_trips: passes of every other loop per pass of the loop around it (of the kernel where it is outermost).
    """

    def passes(schedule: Schedule) -> Sequence[float]:
        hot = schedule.hot_loop()
        chain = []
        while hot is not None:
            chain.append(hot)
            hot = None if hot.parent is None else schedule.loops[hot.parent]
        if len(chain) != len(counts):
            depths = [f"{loop.start}-{loop.stop} depth {loop.depth}" for loop in schedule.loops]
            raise ScheduleError(f"{schedule.name}: its hot loop is {len(chain)} deep, not {len(counts)}: {depths}")
        result: list[float] = []
        for loop in schedule.loops:
            around = 1.0 if loop.parent is None else result[loop.parent]
            place = next((i for i, link in enumerate(reversed(chain)) if link is loop), None)
            result.append(around * side_trips if place is None else counts[place])
        return result

    return passes
