"""Results for people: one kernel in full, or many in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.table import Table

Result = Mapping[str, Any]
_SHOWN_SHARE = 0.01
_UNITS = ("MATMUL", "MATPUSH", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")


def print_table(results: Sequence[Result]) -> None:
    """A row per kernel, shape and generation."""
    columns = ["gen", "shape", "kernel", "compute us", "HBM us", "ratio", "FLOP/s", "HBM", "hot cycles", "busiest"]
    table = Table(*columns, "spills", "VMEM MiB", "compile s")
    for result in results:
        place = [result["generation"], result["shape"], result["kernel"]]
        if "error" in result:
            table.add(*place, str(result["error"]).splitlines()[0][:60], *["-"] * 9)
            continue
        use = result["hot_use"]
        busiest = max((unit for unit in _UNITS if unit in use), key=lambda unit: float(use[unit]))
        table.add(
            *place,
            f"{result['compute_us']:.0f}",
            f"{result['hbm_us']:.0f}",
            f"{result['compute_over_hbm']:.2f}",
            f"{result['flops_share']:.1%}",
            f"{result['bandwidth_share']:.1%}",
            result["hot_cycles"],
            f"{busiest} {use[busiest]:.0%}",
            result["spills"],
            f"{result['vmem_bytes'] / 2**20:.1f}",
            f"{result['compile_s']:.1f}",
        )
    table.print()


def print_report(result: Result) -> None:
    """One kernel in full: each loop, then the estimate."""
    cycles = sum(kernel["total_cycles"] for kernel in result["kernels"])
    for kernel in sorted(result["kernels"], key=lambda kernel: -kernel["total_cycles"]):
        share = kernel["total_cycles"] / cycles
        if share < _SHOWN_SHARE:
            continue
        memory = f"VMEM {kernel['vmem_bytes'] / 2**20:.2f} MiB, SMEM {kernel['smem_bytes']} B"
        print(f"\n{kernel['name']}: {share:.1%} of the time, {kernel['cycles']} bundles, {memory}")
        _print_loops(kernel)
    print(
        f"\n{result['kernel']} {result['shape']} on {result['generation']}: "
        f"compute {result['compute_us']:.1f} us, HBM {result['hbm_us']:.1f} us, "
        f"compute/HBM {result['compute_over_hbm']:.2f}, {result['flops_share']:.1%} of peak FLOP/s, "
        f"{result['bandwidth_share']:.1%} of peak bandwidth at most; compiled in {result['compile_s']:.1f} s "
        f"(libtpu {result['libtpu']}, jax {result['jax']})"
    )


def _print_loops(kernel: Mapping[str, Any]) -> None:
    table = Table("loop", "passes", "cycles", "stalls", "vmatmul", "spill", "fill", "DMA", "wait", "check", *_UNITS)
    rows = [("once", 1, kernel["once"])]
    rows += [
        (f"{'. ' * loop['depth']}{loop['start']}-{loop['stop']}", loop["passes"], loop) for loop in kernel["loops"]
    ]
    for name, passes, work in rows:
        counts = [work[key] for key in ("cycles", "stalls", "vmatmuls", "spills", "fills")]
        counts += [len(work["dmas"]), work["waits"], work["checks"]]
        table.add(name, f"{passes:g}", *counts, *(f"{work['use'].get(unit, 0.0):.0%}" for unit in _UNITS))
    table.print()
    for loop in kernel["loops"]:
        skippable = ", ".join(f"{region['start']}-{region['stop']}" for region in loop["regions"])
        if skippable:
            print(f"  {loop['start']}-{loop['stop']} may skip {skippable}")
