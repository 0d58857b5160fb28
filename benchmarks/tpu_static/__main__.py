"""How fast kernels can be on a TPU, from the compiler's own schedule; no TPU is needed.

One kernel, shape and generation give a report of every loop; several give a table.

python -m benchmarks.tpu_static --kernel matmul --generation v6e --shape 4096-bf16 --dump /tmp/listings
python -m benchmarks.tpu_static --suite attention --generation v6e tpu7x --json results.json --plot cycles.svg
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tpu_static.kernels import KERNELS, SHAPES, SUITES
from benchmarks.tpu_static.plot import draw
from benchmarks.tpu_static.report import print_report, print_table
from benchmarks.tpu_static.schedule import measure
from engine_core.aot.environment import require_libtpu
from engine_core.aot.generation import GENERATIONS
from engine_core.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print; the exit status is 1 where a kernel did not compile, 2 where nothing can."""
    args = _parser().parse_args(argv)
    try:
        require_libtpu()
        jobs = _jobs(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = []
    for kernel, shape, generation in jobs:
        print(f"compiling {kernel} {shape} for {generation}", file=sys.stderr)
        results.append(measure(kernel, generation, shape, args.dump, args.timeout))
    if len(results) == 1 and "error" not in results[0]:
        print_report(results[0])
    else:
        print_table(results)
    for result in results:
        if "error" in result:
            print(f"{result['kernel']} {result['shape']} {result['generation']}: {result['error']}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        args.plot.write_text(draw(results))
    return int(any("error" in result for result in results))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_static", description=__doc__, formatter_class=raw)
    known = f"{', '.join(KERNELS)}, or module:function that builds a Case"
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help=known)
    parser.add_argument("--suite", choices=list(SUITES), help="kernels of one operation, Baton's and others'")
    parser.add_argument("--shape", nargs="+", metavar="NAME", help="default: all of the suite")
    parser.add_argument("--generation", nargs="+", choices=list(GENERATIONS), required=True)
    parser.add_argument("--dump", type=Path, metavar="DIR", help="keep the compiler's listings here (one kernel only)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every loop of every kernel")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where the cycles go, as SVG")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one kernel")
    return parser


def _jobs(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    if not args.kernel and not args.suite:
        raise ConfigError("say --kernel NAME or --suite NAME")
    kernels = args.kernel or SUITES[args.suite]
    shapes = args.shape or SHAPES.get(args.suite)
    if not shapes:
        raise ConfigError("--kernel needs --shape NAME")
    places = itertools.product(args.generation, shapes, kernels)
    jobs = [(kernel, shape, generation) for generation, shape, kernel in places]
    if args.dump and len(jobs) > 1:
        raise ConfigError("--dump wants one kernel, one shape and one generation")
    return jobs


if __name__ == "__main__":
    sys.exit(main())
