"""A real checkpoint that compiles fast: random weights wide enough that greedy answers wander, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.fakes import SPECIAL, make_model_dir, make_tokenizer

LAYERS, WIDTH, FFW, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 4, 2, 16
CONTEXT = 1024
VOCAB = 300  # at least so many tokens


def make_checkpoint(directory: Path) -> Path:
    """config.json, model.safetensors and a tokenizer of exactly the model's vocabulary."""
    make_model_dir(directory)
    tokenizer = make_tokenizer()
    vocab = tokenizer.get_vocab_size()
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.2).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(vocab, WIDTH), "lm_head.weight": normal(vocab, WIDTH)}
    tensors["model.norm.weight"] = np.ones(WIDTH, np.float32)
    for layer in range(LAYERS):
        parts = {
            "self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, WIDTH),
            "self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.o_proj.weight": normal(WIDTH, HEADS * HEAD_DIM),
            "self_attn.q_norm.weight": np.ones(HEAD_DIM, np.float32),
            "self_attn.k_norm.weight": np.ones(HEAD_DIM, np.float32),
            "mlp.gate_proj.weight": normal(FFW, WIDTH),
            "mlp.up_proj.weight": normal(FFW, WIDTH),
            "mlp.down_proj.weight": normal(WIDTH, FFW),
            "input_layernorm.weight": np.ones(WIDTH, np.float32),
            "post_attention_layernorm.weight": np.ones(WIDTH, np.float32),
        }
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in parts.items()}
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": WIDTH,
        "intermediate_size": FFW,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": tokenizer.token_to_id(SPECIAL[0]),
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory
