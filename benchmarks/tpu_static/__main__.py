"""How fast kernels can be on a TPU, from the compiler's own schedule; no TPU is needed.

One kernel, shape and generation give a report of every loop; several give a table. A run that was cut short goes on
where it was: what its --json file holds already of the same libtpu is not compiled again.

python -m benchmarks.tpu_static --kernel matmul --generation v6e --shape 4096-bf16 --dump /tmp/listings
python -m benchmarks.tpu_static --suite attention --generation v6e tpu7x --json results.json --plot cycles.svg
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tpu_static.kernels import KERNELS, SHAPES, SUITES
from benchmarks.tpu_static.plot import draw
from benchmarks.tpu_static.report import print_report, print_table
from benchmarks.tpu_static.schedule import measure
from engine_core.aot.environment import require_libtpu
from engine_core.aot.generation import GENERATIONS
from engine_core.errors import ConfigError

Job = tuple[str, str, str]  # kernel, shape, generation


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print; the exit status is 1 where a kernel did not compile, 2 where nothing can."""
    args = _parser().parse_args(argv)
    try:
        require_libtpu()
        jobs = _jobs(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    known = _known(args.json)
    results = []
    for job in jobs:
        kernel, shape, generation = job
        if job not in known:
            print(f"compiling {kernel} {shape} for {generation}", file=sys.stderr)
            known[job] = measure(kernel, generation, shape, args.dump, args.timeout)
            _keep(args.json, known)
        results.append(known[job])
    if len(results) == 1 and "error" not in results[0]:
        print_report(results[0])
    else:
        print_table(results)
    for result in results:
        if "error" in result:
            print(f"{result['kernel']} {result['shape']} {result['generation']}: {result['error']}", file=sys.stderr)
    if args.plot:
        args.plot.write_text(draw(results))
    return int(any("error" in result for result in results))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_static", description=__doc__, formatter_class=raw)
    known = f"{', '.join(KERNELS)}, or module:function that builds a Case"
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help=known)
    suites = "kernels of one operation, Baton's and others'"
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), help=suites, default=[])
    parser.add_argument("--shape", nargs="+", metavar="NAME", help="default: all of the suite")
    parser.add_argument("--generation", nargs="+", choices=list(GENERATIONS), required=True)
    parser.add_argument("--dump", type=Path, metavar="DIR", help="keep the compiler's listings here (one kernel only)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every loop of every kernel")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where the cycles go, as SVG")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one kernel")
    return parser


def _known(path: Path | None) -> dict[Job, dict[str, Any]]:
    """Results that a file holds of the installed libtpu, but for errors."""
    if path is None or not path.is_file():
        return {}
    libtpu = importlib.metadata.version("libtpu")
    found = [result for result in json.loads(path.read_text()) if result.get("libtpu") == libtpu]
    return {(result["kernel"], result["shape"], result["generation"]): result for result in found}


def _keep(path: Path | None, known: Mapping[Job, dict[str, Any]]) -> None:
    if path is not None:
        path.write_text(json.dumps(list(known.values()), indent=1) + "\n")


def _jobs(args: argparse.Namespace) -> list[Job]:
    if not args.kernel and not args.suite:
        raise ConfigError("say --kernel NAME or --suite NAME")
    if args.kernel and not args.shape:
        raise ConfigError("--kernel needs --shape NAME")
    chosen = [(args.kernel, args.shape)] if args.kernel else []
    chosen += [(SUITES[suite], args.shape or SHAPES[suite]) for suite in args.suite]
    jobs = [
        (kernel, shape, generation)
        for generation in args.generation
        for kernels, shapes in chosen
        for shape, kernel in itertools.product(shapes, kernels)
    ]
    if args.dump and len(jobs) > 1:
        raise ConfigError("--dump wants one kernel, one shape and one generation")
    return jobs


if __name__ == "__main__":
    sys.exit(main())
