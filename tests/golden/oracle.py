"""Hugging Face transformers as the oracle. Needs torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.golden.cases import CASES, NUM_GENERATED


def make_checkpoint(case: str, directory: Path, seed: int, dtype: str, max_shard_size: str) -> None:
    """Save a random model of a case; norms and biases are random too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    settings = dict(CASES[case])
    theta = settings.pop("rope_theta")
    scaling = settings.pop("rope_scaling", {"rope_type": "default"})
    settings["rope_parameters"] = {**scaling, "rope_theta": theta}
    config = AutoConfig.for_model(case, **settings)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)


def greedy(directory: Path, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """Continue a prompt without a cache, in f32.

    Returns:
        (prompt and generated tokens, [len, V] f32 logits of each).
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NUM_GENERATED):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
            tokens.append(int(logits[-1].argmax()))
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return tokens, logits.numpy()
