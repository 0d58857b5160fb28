import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from deploy.checkpoint import DEMO_DIR, check_safetensors, resolve, validate
from engine_core.errors import CheckpointError

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 32,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(model: Path) -> Path:
    (model / "model.safetensors").rename(model / "one.safetensors")
    save_file({"c": np.zeros(3, np.float32)}, model / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def test_a_sound_checkpoint_passes(model: Path) -> None:
    assert validate(model).architecture == "Qwen3ForCausalLM"
    assert check_safetensors(model / "model.safetensors") == {"a", "b"}


def test_a_sharded_checkpoint_passes(sharded: Path) -> None:
    validate(sharded)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_truncated_weights_are_refused(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|malformed)"):
        validate(model)


def test_trailing_bytes_and_garbage_are_refused(model: Path) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="malformed"):
        validate(model)
    path.write_bytes(whole[:8] + b"[" + whole[9:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        validate(model)


def test_a_missing_shard_or_tensor_is_named(sharded: Path) -> None:
    save_file({"d": np.zeros(3, np.float32)}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors lacks c"):
        validate(sharded)
    (sharded / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors does not exist"):
        validate(sharded)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", json.dumps(CONFIG | {"architectures": ["Mamba"]}), "Mamba"),
        ("tokenizer.json", "nonsense", "tokenizer.json cannot be read"),
    ],
)
def test_malformed_files_are_named(model: Path, file: str, text: str, words: str) -> None:
    (model / file).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        validate(model)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_are_named(model: Path, file: str) -> None:
    (model / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        validate(model)


def test_resolve(tmp_path: Path) -> None:
    def silent(text: str) -> None: ...

    assert resolve("demo", "", silent) == DEMO_DIR
    assert resolve(str(tmp_path), "", silent) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(tmp_path / "file"), "", silent)
    for name in ("./nowhere", "/nowhere/at/all", "justaname"):
        with pytest.raises(CheckpointError, match="neither a directory nor a hub id"):
            resolve(name, "", silent)
