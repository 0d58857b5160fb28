"""Held-out loss of the demo model: ``python -m examples.demo_model.evaluate``.

Reads the exported weights, and evenly spaced windows of the held-out text that ``prepare`` wrote under ``--work``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import Qwen3ForCausalLM

WINDOW = 512  # tokens predicted per window, in training and here
KINDS = ("prose", "code", "dialogue")


def loss_of(model: Qwen3ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of [B, T + 1] tokens, nats per token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, work: Path, kind: str, max_windows: int) -> float:
    """Held-out loss of one kind of text, nats per token, over evenly spaced windows."""
    tokens = np.load(work / f"tokens_{kind}_held_out.npy").astype(np.int64)
    count = min(max_windows, (len(tokens) - 1) // WINDOW)
    starts = np.linspace(0, len(tokens) - WINDOW - 1, count).astype(int)
    rows = torch.from_numpy(np.stack([tokens[start : start + WINDOW + 1] for start in starts]))
    return float(np.mean([loss_of(model, row[None]).item() for row in rows]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("deploy/demo_model"))
    parser.add_argument("--work", type=Path, default=Path("demo_model_work"))
    parser.add_argument("--windows", type=int, default=64, help="per kind of text; all there are at most")
    arguments = parser.parse_args()
    model = Qwen3ForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    meta = json.loads((arguments.work / "meta.json").read_text(encoding="utf-8"))
    for kind in KINDS:
        sizes = meta[f"tokens_{kind}_held_out"]
        loss = evaluate(model, arguments.work, kind, arguments.windows)
        per_byte = loss * sizes["tokens"] / sizes["bytes"]
        sys.stdout.write(f"{kind}: {loss:.3f} nats per token, {per_byte:.3f} nats per byte\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
