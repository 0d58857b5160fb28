"""The parity check itself, shared by the golden and the live tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine_core.config import Degrees
from engine_core.kernels.cpu.choice import CpuKernels
from tests.engine_core.paged_runner import Chunk, PagedRunner, replay
from tests.golden.cases import LENGTH_A, LENGTH_B, SHARED

GOLDEN = Path(__file__).parents[1] / "golden"
# f32 on both sides, but products are summed in other orders; logits reach about 20.
TOLERANCE = 1e-4

IDLE: tuple[list[Chunk], int, int, list] = ([], 4, 4, [])
Expected = list[tuple[list[int], np.ndarray]]  # of A and B: tokens, [len, V] logits


def load_expected(case: str) -> Expected:
    """What transformers computed for a golden case."""
    stored = np.load(GOLDEN / case / "expected.npz")
    return [(stored[f"tokens_{x}"].tolist(), stored[f"logits_{x}"]) for x in "ab"]


def check_parity(
    directory: Path,
    expected: Expected,
    *,
    scan: bool,
    degrees: Degrees,
    experts: str,
    kernels: CpuKernels | None = None,
) -> PagedRunner:
    """Logits of every position, and every greedy token, equal the oracle's; returns the runner.

    Each row shard serves the same two sequences, but starts a step later than the one before it and so idles, reads
    prompts and decodes while the others do something else.
    """
    runner = PagedRunner(directory, scan=scan, degrees=degrees, experts=experts, kernels=kernels)
    (tokens_a, _), (tokens_b, _) = expected
    steps = list(replay(tokens_a, tokens_b, (LENGTH_A, LENGTH_B), SHARED))
    checked = 0
    for now in range(len(steps) + runner.shards - 1):
        work = [steps[now - shard] if 0 <= now - shard < len(steps) else IDLE for shard in range(runner.shards)]
        num_tokens, num_rows = max(step[1:3] for step in work)
        logits = runner.shard_logits([step[0] for step in work], num_tokens, num_rows)
        assert logits.shape[-1] == expected[0][1].shape[1]
        drawn = runner.run_shards([step[0] for step in work], num_tokens, num_rows)
        for shard, (chunks, _, _, places) in enumerate(work):
            checked += _check(expected, chunks, places, logits[shard], drawn[shard])
    assert checked == runner.shards * (len(tokens_a) - LENGTH_A + len(tokens_b) - LENGTH_B)
    return runner


def _check(expected: Expected, chunks: list[Chunk], places: list, logits: np.ndarray, drawn: np.ndarray) -> int:
    """Compare what one step computed of these chunks; how many drawn tokens were compared."""
    at = checked = 0
    for row, (chunk, (sequence, start)) in enumerate(zip(chunks, places, strict=True)):
        count = len(chunk.tokens)
        tokens, wanted = expected[sequence]
        np.testing.assert_allclose(logits[at : at + count], wanted[start : start + count], rtol=0, atol=TOLERANCE)
        position = start + count
        if position >= (LENGTH_A, LENGTH_B)[sequence] and position < len(tokens):
            assert drawn[row] == tokens[position]
            checked += 1
        at += count
    return checked
