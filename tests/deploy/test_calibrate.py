"""`baton calibrate`: what it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy import cli
from engine_core.kv_cache import FLOAT8_MAX
from engine_core.kv_calibration import HEADROOM
from engine_core.kv_scales import read_kv_scales
from tests.e2e.model import HEAD_DIM, KV_HEADS, LAYERS, make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("calibrate") / "tiny")


def test_the_largest_value_of_each_head_fits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # of the compilation cache
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox\n\n" + "jumps over the lazy dog " * 20 + "\n")
    given = ["--model", str(model), "--prompts", str(prompts), "--max-tokens", "50"]
    assert cli.main(["calibrate", *given]) == 0
    assert "2 prompts" in capsys.readouterr().err
    scales = read_kv_scales(model, LAYERS, KV_HEADS)
    assert scales is not None
    largest = np.array(scales).reshape(LAYERS, KV_HEADS, 2) * FLOAT8_MAX / HEADROOM
    keys, values = largest[..., 0], largest[..., 1]
    assert (keys > 1).all() and (keys <= HEAD_DIM**0.5 + 1e-3).all(), "they are normed, then rotated"
    assert len(np.unique(values)) == values.size and (values > 0).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "absent.txt"], "--prompts absent.txt is no file"),
        (["--prompts", "EMPTY"], "has no line of text"),
        (["--prompts", "EMPTY", "--max-tokens", "0"], "--max-tokens must be positive"),
    ],
)
def test_bad_flags_are_refused(
    model: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    given = [str(empty) if flag == "EMPTY" else flag for flag in flags]
    assert cli.main(["calibrate", "--model", str(model), *given]) == 2
    assert message in capsys.readouterr().err
