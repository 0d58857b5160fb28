"""The parity check itself, shared by the golden and the live tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.engine_core.paged_runner import PagedRunner, replay
from tests.golden.cases import LENGTH_A, LENGTH_B, SHARED

# f32 on both sides, but products are summed in other orders; logits reach about 20.
TOLERANCE = 1e-4

Expected = list[tuple[list[int], np.ndarray]]  # of A and B: tokens, [len, V] logits


def check_parity(directory: Path, expected: Expected, scan: bool) -> None:
    """Logits of every position, and every greedy token, equal the oracle's."""
    runner = PagedRunner(directory, scan=scan)
    (tokens_a, _), (tokens_b, _) = expected
    checked = 0
    for chunks, num_tokens, num_rows, places in replay(tokens_a, tokens_b, (LENGTH_A, LENGTH_B), SHARED):
        logits = runner.logits(chunks, num_tokens, num_rows)
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
