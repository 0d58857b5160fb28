"""The same against live transformers, on sharded f32 checkpoints made on the spot."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from engine_core.config import Degrees
from tests.engine_core.parity import check_parity
from tests.golden.cases import CASES, prompts

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    oracle = importlib.import_module("tests.golden.oracle")
    seed = 100 + len(case)
    oracle.make_checkpoint(case, tmp_path, seed=seed, dtype="float32", max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    expected = [oracle.greedy(tmp_path, prompt) for prompt in prompts(seed)]
    check_parity(tmp_path, expected, scan=False, degrees=Degrees(), experts="auto")
