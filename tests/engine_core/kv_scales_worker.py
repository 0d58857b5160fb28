"""Run by test_kv_scales, on two devices: logits of a scaled checkpoint over a float8 cache, against its source's.

XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m tests.engine_core.kv_scales_worker SCALED_DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from engine_core.config import Degrees
from engine_core.kv_scales import FILE
from tests.engine_core.paged_runner import Chunk, PagedRunner
from tests.scaled_checkpoint import SOURCE

PROMPT = [(7 * i + 3) % 149 for i in range(30)]
PAGES = [3, 1, 4, 15, 9, 2, 6, 5]


def logits(directory: Path, tp: int, scan: bool) -> np.ndarray:
    """[30, V], of tokens that attend to what is in the cache, those of the same step included."""
    runner = PagedRunner(directory, scan=scan, degrees=Degrees(tp=tp), cache_dtype="float8_e4m3fn")
    return runner.logits([Chunk(PAGES, 0, PROMPT)], 32, 3)[: len(PROMPT)]


def farthest(one: np.ndarray, other: np.ndarray) -> float:
    return float(abs(one - other).max())


if __name__ == "__main__":
    scaled = Path(sys.argv[1])
    for tp, scan in [(1, False), (2, True)]:
        expected = logits(SOURCE, tp, scan)
        print(json.dumps({"tp": tp, "scan": scan, "apart": farthest(logits(scaled, tp, scan), expected)}), flush=True)
    (scaled / FILE).unlink()
    print(json.dumps({"without": farthest(logits(scaled, tp, scan), expected)}))
