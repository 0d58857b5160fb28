"""What cannot be served is refused at start: one clear line, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.baton_process import Baton, free_port
from tests.e2e.model import make_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def refusal(home: Path, model: str, *flags: str) -> str:
    """What `baton serve` says."""
    running = Baton(
        home, free_port(), "-m", "deploy.cli", "serve", "--model", model, "--port", str(free_port()), *flags
    )
    try:
        status = running.process.wait(180)
        text = running.log.read_text()
        assert status == 2, text
        assert "Traceback" not in text
        assert not list(home.glob(".cache/baton/run/*"))
        return text
    finally:
        running.close()


def test_a_truncated_file(broken: Path, tmp_path: Path) -> None:
    file = broken / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1000])
    said = f"baton: error: {file} is truncated: {size - 1000} bytes, its header says {size}\n"
    assert refusal(tmp_path, str(broken)) == said


def test_an_unknown_architecture(broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    text = refusal(tmp_path, str(broken))
    assert text.startswith("baton: error: ") and text.count("\n") == 1 and "MambaForCausalLM" in text


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file(broken: Path, tmp_path: Path, name: str) -> None:
    (broken / name).unlink()
    text = refusal(tmp_path, str(broken))
    assert text.startswith("baton: error: ") and text.count("\n") == 1 and name in text


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    assert refusal(tmp_path, "./nowhere").startswith("baton: error: './nowhere' is neither a directory nor a hub id")


def test_a_model_that_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    """Only the workers know their devices, so this one is refused once Ray is up."""
    text = refusal(tmp_path, str(checkpoint), "--cache.num_pages", "10")
    lines = [line for line in text.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "the model does not fit" in lines[0] and "cache.num_pages" in lines[0]
