"""Decode and prefill speed of Hugging Face transformers (torch on the CPU), the peer of `bench engine`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


class TransformersProbe:
    """The peer, driven step by step with its own KV cache (no `generate()` overhead: its best case).

    Args:
        model: checkpoint directory.
        dtype: float32 or bfloat16.
        context: tokens in the cache when decoding starts.
    """

    def __init__(self, model: Path, dtype: str, context: int) -> None:
        # Spinning OpenMP barriers collapse when anything else runs; this is the peer's best setting on a small machine.
        os.putenv("OMP_WAIT_POLICY", "passive")
        import torch  # noqa: PLC0415  after the setting above
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        self._torch = torch
        torch.set_grad_enabled(False)
        self._context = context
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model = loaded.eval()

    def decode(self, batch: int, steps: int) -> float:
        """Tokens/s of the best of `steps` decode steps with `batch` sequences."""
        torch = self._torch
        ids = torch.randint(0, 1000, (batch, self._context))
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        best = float("inf")
        for _ in range(steps + 1):
            start = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            out = self._model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            best = min(best, time.perf_counter() - start)
        return batch / best

    def prefill(self, size: int, steps: int) -> float:
        """Tokens/s of the best of `steps` prefills of `size` tokens."""
        ids = self._torch.randint(0, 1000, (1, size))
        best = float("inf")
        for _ in range(steps):
            start = time.perf_counter()
            self._model(ids, use_cache=True, logits_to_keep=1)
            best = min(best, time.perf_counter() - start)
        return size / best
