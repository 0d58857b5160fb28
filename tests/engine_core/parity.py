"""The parity check itself, shared by the golden and the live tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.engine_core.paged_runner import PagedRunner, replay
from tests.golden.cases import LENGTH_A, LENGTH_B, SHARED

GOLDEN = Path(__file__).parents[1] / "golden"
# f32 on both sides, but products are summed in other orders; logits reach about 20.
TOLERANCE = 1e-4

Expected = list[tuple[list[int], np.ndarray]]  # of A and B: tokens, [len, V] logits


def load_expected(case: str) -> Expected:
    """What transformers computed for a golden case."""
    stored = np.load(GOLDEN / case / "expected.npz")
    return [(stored[f"tokens_{x}"].tolist(), stored[f"logits_{x}"]) for x in "ab"]


def check_parity(directory: Path, expected: Expected, *, scan: bool, tp: int) -> PagedRunner:
    """Logits of every position, and every greedy token, equal the oracle's; returns the runner."""
    runner = PagedRunner(directory, scan=scan, tp=tp)
    (tokens_a, _), (tokens_b, _) = expected
    checked = 0
    for chunks, num_tokens, num_rows, places in replay(tokens_a, tokens_b, (LENGTH_A, LENGTH_B), SHARED):
        logits = runner.logits(chunks, num_tokens, num_rows)
        assert logits.shape[1] == expected[0][1].shape[1]
        drawn = runner.run(chunks, num_tokens, num_rows)
        at = 0
        for row, (chunk, (sequence, start)) in enumerate(zip(chunks, places, strict=True)):
            count = len(chunk.tokens)
            tokens, wanted = expected[sequence]
            np.testing.assert_allclose(logits[at : at + count], wanted[start : start + count], rtol=0, atol=TOLERANCE)
            position = start + count
            if position >= (LENGTH_A, LENGTH_B)[sequence] and position < len(tokens):
                assert drawn[row] == tokens[position]
                checked += 1
            at += count
    assert checked == len(tokens_a) - LENGTH_A + len(tokens_b) - LENGTH_B
    return runner
