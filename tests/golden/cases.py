"""The tiny models and sequences of the parity tests, shared by the live oracle, the golden files and their readers.

Prompt B begins with the first `SHARED` tokens of prompt A, so that B can start from A's pages.
"""

from __future__ import annotations

import numpy as np

VOCAB = 149
SHARED = 16
LENGTH_A, LENGTH_B = 37, 27
NUM_GENERATED = 12

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 5,
}
# One case per architecture; between them: biases, head norms, tied and untied, a head_dim apart from D / N,
# Llama 3 rope scaling, a sliding window in all layers and in some, experts in all layers and in some, weighted by
# normalized scores and not.
CASES: dict[str, dict] = {
    "qwen2": {
        **COMMON,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "rope_theta": 1000.0,
    },
    "qwen3": {**COMMON, "head_dim": 24, "tie_word_embeddings": False, "rope_theta": 50000.0},
    "llama": {
        **COMMON,
        "tie_word_embeddings": True,
        "rope_theta": 5000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {
        **COMMON,
        "num_key_value_heads": 4,
        "head_dim": 20,
        "tie_word_embeddings": False,
        "sliding_window": 7,
        "rope_theta": 10000.0,
    },
    "qwen3_moe": {
        **COMMON,
        "head_dim": 24,
        "tie_word_embeddings": False,
        "rope_theta": 50000.0,
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
    "mixtral": {
        **COMMON,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 11,
    },
}


def prompts(seed: int) -> tuple[list[int], list[int]]:
    """Prompts A and B."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, VOCAB, LENGTH_A).tolist()
    b = a[:SHARED] + rng.integers(0, VOCAB, LENGTH_B - SHARED).tolist()
    return a, b
