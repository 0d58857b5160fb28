"""The demo model's architecture (Qwen3, 9.4 million parameters) and how it is written to disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.demo_model.tokenizer import END_OF_TEXT_ID, IM_END_ID

VOCAB_SIZE = 6144
MAX_POSITIONS = 8192
ROPE_THETA = 10_000.0


def build_model() -> Qwen3ForCausalLM:
    """A randomly initialised model in float32."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=128,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            attention_bias=False,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=IM_END_ID,
            pad_token_id=END_OF_TEXT_ID,
        )
    )


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, the tied embedding counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(model: Qwen3ForCausalLM, directory: Path) -> None:
    """Writes bfloat16 ``model.safetensors``, ``config.json`` and ``generation_config.json``.

    The two JSON files are written by hand rather than by transformers, so that versions 4 and 5 both read them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous().clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    _write_json(directory / "config.json", model_config(model.config))
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "eos_token_id": [IM_END_ID, END_OF_TEXT_ID],
        "pad_token_id": END_OF_TEXT_ID,
    }
    _write_json(directory / "generation_config.json", generation)


def model_config(config: Qwen3Config) -> dict[str, object]:
    """``config.json``: the keys of transformers 4 (``rope_theta``, ``torch_dtype``) and of 5 side by side."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "tie_word_embeddings": True,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": IM_END_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
