"""Units of float8 caches: read and refused, and what the model makes of them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine_core.errors import CheckpointError
from engine_core.kv_scales import FILE, read_kv_scales, write_kv_scales
from engine_core.models.registry import load_spec
from engine_core.resolve import checkpoint_identity
from tests.engine_core.virtual_devices import results_of
from tests.scaled_checkpoint import SOURCE, scaled_checkpoint

SCALES = ((1.0, 2.0, 3.0, 4.0), (0.5, 0.25, 8.0, 0.125))


def test_they_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_kv_scales(tmp_path, 2, 2) is None
    write_kv_scales(tmp_path, SCALES)
    assert read_kv_scales(tmp_path, 2, 2) == SCALES
    names = load_file(tmp_path / FILE)
    assert names["model.layers.1.self_attn.k_scale"].tolist() == [0.5, 8.0]
    assert names["model.layers.1.self_attn.v_scale"].tolist() == [0.25, 0.125]


def test_one_for_all_heads_of_a_layer_will_do(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.0.self_attn.{side}_scale": np.array(value, ml_dtypes.bfloat16)
        for side, value in (("k", 2.0), ("v", [0.5]))
    }
    save_file(tensors, tmp_path / FILE)
    assert read_kv_scales(tmp_path, 1, 3) == ((2.0, 0.5, 2.0, 0.5, 2.0, 0.5),)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a layer too few", "layers.1"),
        ("a layer too many", "layers.2"),
        ("another number of heads", "one or 2 positive numbers"),
        ("zero", "positive"),
        ("negative", "positive"),
        ("nan", "positive"),
        ("rubbish", "no safetensors file"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, fault: str, message: str) -> None:
    write_kv_scales(tmp_path, SCALES)
    path = tmp_path / FILE
    tensors = load_file(path)
    name = "model.layers.1.self_attn.v_scale"
    values = {"zero": [0.0, 1.0], "negative": [-1.0, 1.0], "nan": [1.0, np.nan], "another number of heads": [1.0] * 3}
    if fault == "a layer too few":
        del tensors[name]
    elif fault == "a layer too many":
        tensors[name.replace("1", "2")] = tensors[name]
    elif fault in values:
        tensors[name] = np.array(values[fault], np.float32)
    save_file(tensors, path)
    if fault == "rubbish":
        path.write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match=message):
        read_kv_scales(tmp_path, 2, 2)


def test_they_are_a_part_of_the_model(tmp_path: Path) -> None:
    directory = scaled_checkpoint(tmp_path / "scaled")
    spec, identity = load_spec(directory), checkpoint_identity(directory)
    assert spec.kv_scales is not None and load_spec(SOURCE).kv_scales is None
    (directory / FILE).unlink()
    assert load_spec(directory) != spec and checkpoint_identity(directory) != identity


def test_values_beyond_float8_are_as_good_as_small_ones(tmp_path: Path) -> None:
    """Unrolled on one device, and scanned with split heads; bit by bit, as the units are powers of two."""
    directory = scaled_checkpoint(tmp_path / "scaled")
    *found, without = results_of("kv_scales_worker", 2, str(directory))
    assert found == [{"tp": 1, "scan": False, "apart": 0.0}, {"tp": 2, "scan": True, "apart": 0.0}]
    assert without["without"] > 1, "they would have been clipped"
