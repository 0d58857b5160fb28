"""Logits and greedy tokens against what transformers computed when the golden files were made (no torch needed)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.engine_core.parity import check_parity
from tests.golden.cases import CASES

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case: str, scan: bool) -> None:
    stored = np.load(GOLDEN / case / "expected.npz")
    expected = [(stored[f"tokens_{x}"].tolist(), stored[f"logits_{x}"]) for x in "ab"]
    check_parity(GOLDEN / case, expected, scan)
