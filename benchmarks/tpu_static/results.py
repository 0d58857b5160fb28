"""The committed page of results: tables, goals judged line by line, a plot and the figures as JSON.

python -m benchmarks.tpu_static --suite attention grouped --generation v6e --json v6e.json      (once per generation)
python -m benchmarks.tpu_static.results v6e.json tpu7x.json v5e.json v5p.json
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tpu_static.kernels import SHAPES, SUITES
from benchmarks.tpu_static.plot import draw, split_cycles

Result = Mapping[str, Any]
_HERE = Path(__file__).parent
_UNITS = ("MATMUL", "MATPUSH", "VALU", "XLU", "EUP", "VLOAD", "VSTORE", "SALU")
_OWN = "baton-"
_DECODE_RATIO = 0.8
_PREFILL_SHARE = {"v6e": 0.35, "tpu7x": 0.35, "v5e": 0.70}
_COMPILE_S = 30.0
_DENSE = ("qwen3-8b", "qwen3-32b-tp4")
_HEADER = (
    "kernel",
    "compute us",
    "HBM us",
    "ratio",
    "MFU",
    "MBU",
    "hot cycles",
    "use of the hot body",
    "spills, fills",
    "DMA MB",
    "VMEM MiB",
    "SMEM KiB",
    "compile s (CPU s)",
)


def time_us(result: Result) -> float:
    """The larger of both limits."""
    return max(float(result["compute_us"]), float(result["hbm_us"]))


def judge(results: Sequence[Result]) -> list[tuple[str, str, bool]]:
    """Each goal at each place: what is asked, what the figures are, whether it is met."""
    good = [result for result in results if "error" not in result]
    own = [result for result in good if result["kernel"].startswith(_OWN)]
    lines = []
    for result in own:
        model, _, phase = result["shape"].rpartition("-")
        place = f"{result['shape']} on {result['generation']}"
        if result["kernel"] != "baton-attention" or model not in _DENSE:
            continue
        if phase == "decode" and result["generation"] in ("v6e", "tpu7x"):
            ratio = result["compute_over_hbm"]
            lines.append((f"{place}: compute/HBM at most {_DECODE_RATIO}", f"{ratio:.2f}", ratio <= _DECODE_RATIO))
        if phase == "prefill" and (goal := _PREFILL_SHARE.get(result["generation"])):
            share = result["flops_share"]
            lines.append((f"{place}: MFU at least {goal:.0%}", f"{share:.1%}", share >= goal))
    for result in own:
        others = [
            peer
            for peer in good
            if not peer["kernel"].startswith(_OWN)
            and (peer["shape"], peer["generation"]) == (result["shape"], result["generation"])
        ]
        if others:
            best = min(others, key=time_us)
            asked = f"{result['shape']} on {result['generation']}: not slower than the best other"
            figures = f"{time_us(result):.0f} us; {best['kernel']} {time_us(best):.0f} us"
            lines.append((asked, figures, time_us(result) <= time_us(best) * 1.0005))
    for result in sorted(own, key=lambda one: -float(one["compile_cpu_s"]))[:3]:
        asked = f"{result['shape']} on {result['generation']}: compiled within {_COMPILE_S:.0f} s (the slowest three)"
        figures = f"{result['compile_cpu_s']:.1f} s of CPU, {result['compile_s']:.1f} s beside other work"
        lines.append((asked, figures, result["compile_cpu_s"] <= _COMPILE_S))
    return lines


def write_page(results: Sequence[Result], date: str) -> str:
    """The page, as Markdown."""
    good = [result for result in results if "error" not in result]
    versions = {(result["libtpu"], result["jax"]) for result in good}
    made = ", ".join(f"libtpu {libtpu} and jax {jax}" for libtpu, jax in sorted(versions))
    lines = [_INTRODUCTION.format(date=date, made=made), "## Goals", "", *_rows(("goal", "figure", "met"))]
    lines += [_row((asked, figures, "yes" if met else "**no**")) for asked, figures, met in judge(results)]
    if gaps := find_gaps(results):
        lines += ["", "Not measured, for want of time (the commands above add them):", ""]
        lines += [f"- {kernel} on {generation}: {', '.join(shapes)}" for (kernel, generation), shapes in gaps.items()]
    for generation, members in itertools.groupby(results, key=lambda result: str(result["generation"])):
        lines += ["", f"## {generation}"]
        for shape, rows in itertools.groupby(members, key=lambda result: str(result["shape"])):
            lines += ["", f"### {shape} on {generation}", "", *_rows(_HEADER), *(_describe(row) for row in rows)]
    return "\n".join(lines) + "\n"


def find_gaps(results: Sequence[Result]) -> dict[tuple[str, str], list[str]]:
    """Shapes without a row, by kernel and generation; of the generations that have any."""
    known = {(result["kernel"], result["shape"], result["generation"]) for result in results}
    gaps: dict[tuple[str, str], list[str]] = {}
    for generation, suite in itertools.product(dict.fromkeys(str(r["generation"]) for r in results), SUITES):
        for kernel, shape in itertools.product(SUITES[suite], SHAPES[suite]):
            if (kernel, shape, generation) not in known:
                gaps.setdefault((kernel, generation), []).append(shape)
    return gaps


def shorten(result: Result) -> dict[str, Any]:
    """A result without its loops: kernels by name, where the cycles go."""
    if "error" in result:
        return dict(result)
    kernels = [
        {name: kernel[name] for name in ("name", "total_cycles", "vmem_bytes", "smem_bytes")}
        for kernel in result["kernels"]
    ]
    use = {unit: round(share, 3) for unit, share in result["hot_use"].items()}
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}
    return {**rounded, "hot_use": use, "kernels": kernels, "cycles_by_part": split_cycles(result)}


def _describe(result: Result) -> str:
    if "error" in result:
        return _row((result["kernel"], str(result["error"]).splitlines()[0][:120], *[""] * (len(_HEADER) - 2)))
    use = sorted(((result["hot_use"].get(unit, 0.0), unit) for unit in _UNITS), reverse=True)[:4]
    return _row(
        (
            result["kernel"],
            f"{result['compute_us']:.1f}",
            f"{result['hbm_us']:.1f}",
            f"{result['compute_over_hbm']:.2f}",
            f"{result['flops_share']:.1%}",
            f"{result['bandwidth_share']:.1%}",
            str(result["hot_cycles"]),
            ", ".join(f"{unit} {share:.0%}" for share, unit in use),
            f"{result['spills']}, {result['fills']}",
            f"{result['hbm_bytes'] / 1e6:.1f}",
            f"{result['vmem_bytes'] / 2**20:.1f}",
            f"{result['smem_bytes'] / 2**10:.1f}",
            f"{result['compile_s']:.1f} ({result['compile_cpu_s']:.1f})",
        )
    )


def _rows(header: Sequence[str]) -> Iterable[str]:
    return (_row(header), _row(["---"] * len(header)))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


_INTRODUCTION = """# Kernels by the compiler's own schedule

Made on {date} with {made}; no TPU was used. Written by

    python -m benchmarks.tpu_static --suite attention grouped --generation v6e --json v6e.json
    python -m benchmarks.tpu_static.results v6e.json tpu7x.json v5e.json v5p.json

(the first line once per generation, on Python 3.12 with `pip install tokamax`; a run takes about half an hour on two
cores).

- *Compute* is the cycles of every loop body times its passes, stalls included, on one TensorCore; *HBM* the bytes
  that the operation must move at the least (*DMA MB*) at the peak bandwidth. The time is the larger of both: a
  lower bound that leaves out contention, launches and exposed waits. `docs/plan.md` says more.
- *MFU* and *MBU* are shares of the peaks if that time is reached. A head_dim of 128 fills half of a 256-wide MXU
  (v6e, tpu7x) in the product with the keys.
- Attention: one layer, pages of 128; decode is 128 sequences of 4096 tokens, prefill a chunk of 2048 tokens at
  8192. `jax-rpa` does not write this step's keys and values; the others do. Grouped: all 128 experts on one device;
  decode is 128 tokens, prefill 2048; `up` is the product with gate and up matrices, and Baton's SwiGLU is in it.
- The plot, [cycles.svg](cycles.svg), shows where each kernel's cycles go; [results.json](results.json) has the
  figures.
- *Compile s* is that of the run, beside other work on the same two cores; in brackets the CPU time of all the
  compiler's threads, which is what it takes at most on a machine of its own.
- On v5p one program drives two TensorCores, of which all these kernels use one.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Read results, write RESULTS.md, results.json and cycles.svg."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_static.results", description=__doc__, formatter_class=raw
    )
    parser.add_argument("files", type=Path, nargs="+", help="--json files of benchmarks.tpu_static")
    args = parser.parse_args(argv)
    results = [result for path in args.files for result in json.loads(path.read_text())]
    order = {generation: place for place, generation in enumerate(dict.fromkeys(r["generation"] for r in results))}
    results.sort(key=lambda r: (order[r["generation"]], r["shape"], r["kernel"]))
    (_HERE / "RESULTS.md").write_text(write_page(results, datetime.datetime.now(datetime.UTC).date().isoformat()))
    short = ",\n".join(json.dumps(shorten(result)) for result in results)
    (_HERE / "results.json").write_text(f"[\n{short}\n]\n")
    (_HERE / "cycles.svg").write_text(draw(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
