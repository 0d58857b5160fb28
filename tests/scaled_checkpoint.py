"""A tiny checkpoint whose keys and values are far beyond what float8 holds, but for the units that lie beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401  # tells NumPy of bfloat16
import numpy as np
from safetensors.numpy import load_file, save_file

from engine_core.kv_scales import write_kv_scales
from tests.mini_cluster import GOLDEN

SOURCE = GOLDEN / "mistral"  # no head norms, no biases
K_POWERS = (10, 11, 9, 12)  # of each KV head
V_POWERS = (12, 9, 13, 10)


def scaled_checkpoint(directory: Path) -> Path:
    """A copy of `SOURCE` that computes the same, its keys and values multiplied by powers of two.

    Exactly the same, even in float8: units of as many powers of two give the same bits in the cache.
    """
    shutil.copytree(SOURCE, directory)
    config = json.loads((directory / "config.json").read_text())
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    queries = np.repeat((K_POWERS, V_POWERS), groups, axis=1)
    factors = {
        "q_proj.weight": (0, -queries[0]),
        "k_proj.weight": (0, K_POWERS),
        "v_proj.weight": (0, V_POWERS),
        "o_proj.weight": (1, -queries[1]),
    }
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        axis, powers = factors.get(name.rpartition("self_attn.")[2], (0, ()))
        if len(powers):
            tensors[name] = _times(tensors[name], axis, powers)
    path.unlink()
    save_file(tensors, path)
    units = tuple(2.0**power for pair in zip(K_POWERS, V_POWERS, strict=True) for power in pair)
    write_kv_scales(directory, (units,) * config["num_hidden_layers"])
    return directory


def _times(tensor: np.ndarray, axis: int, powers: tuple[int, ...] | np.ndarray) -> np.ndarray:
    """Each head of a matrix times its power of two."""
    heads = np.split(tensor.astype(np.float32), len(powers), axis)
    scaled = [np.ldexp(head, int(power)) for head, power in zip(heads, powers, strict=True)]
    return np.concatenate(scaled, axis).astype(tensor.dtype)
