"""Write the golden files: one tiny bf16 checkpoint per architecture, and what transformers computes from it in f32.

    python -m tests.golden.make_golden [CASE ...]

Each case is a directory of its own: a checkpoint, and `expected.npz` with tokens_a, logits_a, tokens_b, logits_b
(prompt and greedy continuation; logits of every position).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tests.golden.cases import CASES, NUM_GENERATED, prompts
from tests.golden.oracle import greedy, make_checkpoint

HERE = Path(__file__).parent


def main() -> None:
    asked = sys.argv[1:] or list(CASES)
    for index, case in enumerate(CASES):
        if case not in asked:
            continue
        directory = HERE / case
        make_checkpoint(case, directory, seed=index, dtype="bfloat16", max_shard_size="1GB")
        tokens_and_logits = [greedy(directory, prompt) for prompt in prompts(seed=index)]
        (tokens_a, logits_a), (tokens_b, logits_b) = tokens_and_logits
        np.savez_compressed(
            directory / "expected.npz", tokens_a=tokens_a, logits_a=logits_a, tokens_b=tokens_b, logits_b=logits_b
        )
        generated = np.concatenate([logits[-NUM_GENERATED - 1 : -1] for _, logits in tokens_and_logits])
        best = np.sort(generated, axis=-1)
        margin = float((best[:, -1] - best[:, -2]).min())
        print(f"{case}: smallest argmax margin {margin:.4f}")


if __name__ == "__main__":
    main()
