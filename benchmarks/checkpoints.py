"""Checkpoints with random weights in the shape of real models, for measurements that need no trained weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "max_position_embeddings": 8192,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _COMMON
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "qwen3-20m": _COMMON
    | {
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 16384,
    },
}
"""config.json contents by name."""


def write_random_checkpoint(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write config.json and model.safetensors (bfloat16, normal with deviation 0.02) of a Qwen3 shape.

    Returns:
        The directory.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    def ones(size: int) -> np.ndarray:
        return np.ones(size, ml_dtypes.bfloat16)

    width, ffw, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], width), "model.norm.weight": ones(width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": ones(width),
            layer + "post_attention_layernorm.weight": ones(width),
            layer + "self_attn.q_proj.weight": normal(queries, width),
            layer + "self_attn.k_proj.weight": normal(keys, width),
            layer + "self_attn.v_proj.weight": normal(keys, width),
            layer + "self_attn.o_proj.weight": normal(width, queries),
            layer + "self_attn.q_norm.weight": ones(head),
            layer + "self_attn.k_norm.weight": ones(head),
            layer + "mlp.gate_proj.weight": normal(ffw, width),
            layer + "mlp.up_proj.weight": normal(ffw, width),
            layer + "mlp.down_proj.weight": normal(width, ffw),
        }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory
