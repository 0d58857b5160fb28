"""The units of a float8 cache: what 1 stands for, in each layer's keys and values, per KV head. Host module.

They lie beside the weights in `kv_scales.safetensors`, under the names that Hugging Face checkpoints use:
`model.layers.<index>.self_attn.k_scale` and `v_scale`, [1] or [K] f32. Without that file every unit is 1.

They belong to the model, not to a worker: every worker of a checkpoint knows them, whatever the dtype of its cache, so
that blocks can be converted between any two.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401  # tells NumPy of bfloat16
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from engine_core.errors import CheckpointError

FILE = "kv_scales.safetensors"

KvScales = tuple[tuple[float, ...], ...]
"""Per layer 2K units, in the order of a block's heads: K0, V0, K1, V1, ..."""


def read_kv_scales(model_dir: Path, num_layers: int, num_kv_heads: int) -> KvScales | None:
    """What a checkpoint says of them; None where it says nothing.

    Raises:
        CheckpointError: the file is damaged, or is not about this model.
    """
    path = model_dir / FILE
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, TypeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None
    names = {_name(layer, side) for layer in range(num_layers) for side in "kv"}
    if tensors.keys() != names:
        differing = sorted(tensors.keys() ^ names)
        raise CheckpointError(f"{path} does not fit the model's {num_layers} layers: {differing[0]}")
    layers = []
    for layer in range(num_layers):
        sides = [_units(path, tensors, _name(layer, side), num_kv_heads) for side in "kv"]
        layers.append(tuple(np.stack(sides, axis=1).reshape(-1).tolist()))
    return tuple(layers)


def write_kv_scales(model_dir: Path, scales: KvScales) -> Path:
    """Put the file beside the weights; returns its path."""
    tensors = {
        _name(layer, side): np.array(units[place::2], np.float32)
        for layer, units in enumerate(scales)
        for place, side in enumerate("kv")
    }
    path = model_dir / FILE
    save_file(tensors, path)
    return path


def _units(path: Path, tensors: dict[str, np.ndarray], name: str, num_kv_heads: int) -> np.ndarray:
    """[K] f32."""
    found = tensors[name].astype(np.float32).reshape(-1)
    if found.size not in (1, num_kv_heads) or not (np.isfinite(found) & (found > 0)).all():
        raise CheckpointError(f"{path}: {name} must be one or {num_kv_heads} positive numbers")
    return np.broadcast_to(found, num_kv_heads)


def _name(layer: int, side: str) -> str:
    return f"model.layers.{layer}.self_attn.{side}_scale"
