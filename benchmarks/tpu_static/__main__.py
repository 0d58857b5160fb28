"""How fast a kernel can be on a TPU, from the compiler's own schedule.

python -m benchmarks.tpu_static --kernel matmul --generation v6e --shape 4096-bf16 [--dump DIR] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import Table
from benchmarks.tpu_static.kernels import KERNELS
from benchmarks.tpu_static.schedule import measure
from engine_core.aot.generation import GENERATIONS

_SHOWN_SHARE = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print; the exit status is 1 where a kernel did not compile."""
    args = _parser().parse_args(argv)
    result = measure(args.kernel, args.generation, args.shape, args.dump, args.timeout)
    if args.json:
        print(json.dumps(result))
    elif "error" in result:
        print(f"{args.kernel} {args.generation} {args.shape}: {result['error']}", file=sys.stderr)
    else:
        print_report(result)
    return int("error" in result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", required=True, help=f"{', '.join(KERNELS)}, or module:function that builds a Case")
    parser.add_argument("--generation", choices=list(GENERATIONS), required=True)
    parser.add_argument("--shape", required=True, help="a name that the kernel knows")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="keep the compiler's listings here")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every loop of every kernel")
    return parser


def print_report(result: dict[str, Any]) -> None:
    """One kernel in full: each loop, then the estimate."""
    cycles = sum(kernel["total_cycles"] for kernel in result["kernels"])
    for kernel in sorted(result["kernels"], key=lambda kernel: -kernel["total_cycles"]):
        if kernel["total_cycles"] < _SHOWN_SHARE * cycles:
            continue
        share = kernel["total_cycles"] / cycles
        memory = f"VMEM {kernel['vmem_bytes'] / 2**20:.2f} MiB, SMEM {kernel['smem_bytes']} B"
        print(f"\n{kernel['name']}: {share:.1%} of the time, {kernel['cycles']} bundles, {memory}")
        columns = ["loop", "passes", "cycles", "stalls", "vmatmul", "spill", "fill", "DMA", "wait", "check"]
        units = ["MATMUL", "MATPUSH", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU"]
        table = Table(*columns, *units)
        rows = [("once", 1, kernel["once"])]
        rows += [
            (f"{'. ' * loop['depth']}{loop['start']}-{loop['stop']}", loop["passes"], loop) for loop in kernel["loops"]
        ]
        for name, passes, work in rows:
            counts = [work[key] for key in ("cycles", "stalls", "vmatmuls", "spills", "fills")]
            counts += [len(work["dmas"]), work["waits"], work["checks"]]
            table.add(name, f"{passes:g}", *counts, *(f"{work['use'].get(unit, 0.0):.0%}" for unit in units))
        table.print()
        for loop in kernel["loops"]:
            skippable = ", ".join(f"{region['start']}-{region['stop']}" for region in loop["regions"])
            if skippable:
                print(f"  {loop['start']}-{loop['stop']} may skip {skippable}")
    print(
        f"\n{result['kernel']} {result['shape']} on {result['generation']}: "
        f"compute {result['compute_us']:.1f} us, HBM {result['hbm_us']:.1f} us, "
        f"compute/HBM {result['compute_over_hbm']:.2f}, {result['flops_share']:.1%} of peak FLOP/s, "
        f"{result['bandwidth_share']:.1%} of peak bandwidth at most; compiled in {result['compile_s']:.1f} s "
        f"(libtpu {result['libtpu']}, jax {result['jax']})"
    )


if __name__ == "__main__":
    sys.exit(main())
