"""Logits and greedy tokens against what transformers computed when the golden files were made (no torch needed)."""

from __future__ import annotations

import pytest

from engine_core.config import Degrees
from tests.engine_core.parity import GOLDEN, check_parity, load_expected
from tests.golden.cases import CASES


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case: str, scan: bool) -> None:
    check_parity(GOLDEN / case, load_expected(case), scan=scan, degrees=Degrees(), experts="auto")
