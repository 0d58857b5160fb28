"""The gate: no kernel of ours may become slower by the compiler's own schedule.

python -m benchmarks.tpu_static.gate            compare with the goldens; the exit status is 1 where one is broken
python -m benchmarks.tpu_static.gate --update   write those of the installed libtpu

The compiler is deterministic, so goldens hold for one libtpu, generation and shape, on any machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tpu_static.schedule import measure

GOLDENS = Path(__file__).parent / "goldens.json"
TOLERANCE = 1.03  # of the hot body's cycles
GATED = [
    *(("matmul", generation, "4096-bf16") for generation in ("v5e", "v5p", "v6e", "tpu7x")),
    *(("matmul", generation, "4096-int8") for generation in ("v5e", "v6e")),
    *(
        ("baton-grouped", generation, f"qwen3-30b-a3b-{shape}")
        for generation in ("v6e", "tpu7x")
        for shape in ("up-decode", "down-prefill")
    ),
    *(
        ("baton-attention", generation, f"qwen3-8b-{phase}")
        for generation in ("v6e", "tpu7x")
        for phase in ("decode", "prefill")
    ),
]
_KEPT = ("hot_cycles", "spills", "checks", "vmatmuls", "hot_dma_bytes")
_TIMEOUT_S = 600.0


def key_of(kernel: str, generation: str, shape: str) -> str:
    """The name of one golden."""
    return f"{kernel} {generation} {shape}"


def load_goldens(path: Path, libtpu: str) -> dict[str, dict[str, Any]]:
    """By `key_of`, those of one libtpu; empty where there are none."""
    goldens: dict[str, dict[str, Any]] = json.loads(path.read_text()).get(libtpu, {}) if path.is_file() else {}
    return goldens


def find_regressions(result: Mapping[str, Any], golden: Mapping[str, Any]) -> list[str]:
    """What is worse than the golden, one sentence each."""
    if "error" in result:
        return [f"does not compile: {result['error']}"]
    worse = []
    if result["hot_cycles"] > golden["hot_cycles"] * TOLERANCE:
        worse.append(f"the hot body takes {result['hot_cycles']} cycles, golden {golden['hot_cycles']}")
    for name in ("spills", "checks"):
        if result[name] > golden[name]:
            worse.append(f"the hot body has {result[name]} {name}, golden {golden[name]}")
    for name in ("vmatmuls", "hot_dma_bytes"):
        if result[name] != golden[name]:
            worse.append(f"the hot body's {name} are {result[name]}, golden {golden[name]}")
    expected = result["expected_dma_bytes"]
    if expected is not None and result["hot_dma_bytes"] != expected:
        worse.append(f"the hot body copies {result['hot_dma_bytes']} bytes, its tiles have {expected}")
    expected = result["expected_copies"]
    if expected is not None and result["hot_copies"] != expected:
        worse.append(f"the hot body starts {result['hot_copies']} copies from HBM, its tiles have {expected} pages")
    expected = result["expected_copy_bytes"]
    if expected is not None and result["copy_bytes"] not in ([], [expected]):
        worse.append(f"copies from HBM are of {result['copy_bytes']} bytes, a page has {expected}")
    return worse


def main(argv: Sequence[str] | None = None) -> int:
    """Compile all gated kernels; compare or update."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_static.gate", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--update", action="store_true", help="write the goldens")
    args = parser.parse_args(argv)
    libtpu = importlib.metadata.version("libtpu")
    goldens = load_goldens(GOLDENS, libtpu)
    failed = False
    for job in GATED:
        result = measure(*job, None, _TIMEOUT_S)
        key = key_of(*job)
        if args.update and "error" not in result:
            goldens[key] = {name: result[name] for name in _KEPT}
        worse = find_regressions(result, goldens[key]) if key in goldens else [f"has no golden for libtpu {libtpu}"]
        failed = failed or bool(worse)
        print(f"{key}: {'; '.join(worse) or 'ok'}", flush=True)
    if args.update:
        known = json.loads(GOLDENS.read_text()) if GOLDENS.is_file() else {}
        GOLDENS.write_text(json.dumps({**known, libtpu: goldens}, indent=1, sort_keys=True) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
