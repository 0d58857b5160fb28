"""Run on 4 virtual CPU devices by `test_tensor_parallel`: prints one JSON object per case.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.engine_core.tensor_parallel_worker
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from tests.engine_core.paged_runner import PagedRunner, replay
from tests.golden.cases import LENGTH_A, LENGTH_B, SHARED

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [("mistral", 4, False), ("qwen2", 2, True), ("qwen3", 2, False), ("llama", 2, True)]


def serve(case: str, tp: int, scan: bool) -> tuple[list[list[int]], np.ndarray, list[np.ndarray], PagedRunner]:
    """Tokens of every step, the logits of the last, the cache after it, and the runner."""
    stored = np.load(GOLDEN / case / "expected.npz")
    runner = PagedRunner(GOLDEN / case, scan=scan, tp=tp)
    sequences = [stored[f"tokens_{x}"].tolist() for x in "ab"]
    drawn = []
    for chunks, num_tokens, num_rows, _ in replay(*sequences, (LENGTH_A, LENGTH_B), SHARED):
        drawn.append(runner.run(chunks, num_tokens, num_rows)[: len(chunks)].tolist())
    logits = runner.logits(chunks, num_tokens, num_rows)
    return drawn, logits, [np.asarray(array) for array in runner.cache.layers], runner


def compare(case: str, tp: int, scan: bool) -> dict:
    one_tokens, one_logits, one_cache, _ = serve(case, 1, scan)
    tokens, logits, cache, runner = serve(case, tp, scan)
    plan = jax.tree.leaves(runner.model.plan())
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(runner.params)]
    text = runner.step.lower(runner.params, runner.cache, runner.slots, runner.inputs([], 4, 4)).as_text()
    return {
        "case": case,
        "tp": tp,
        "scan": scan,
        "same_tokens": tokens == one_tokens,
        "vocab": logits.shape[1],
        "logits_difference": float(np.abs(logits - one_logits).max()),
        "cache_difference": max(float(np.abs(a - b).max()) for a, b in zip(cache, one_cache, strict=True)),
        "split_leaves": sum(
            int(np.prod(shape)) * tp == int(np.prod(leaf.shape)) for leaf, shape in zip(plan, shapes, strict=True)
        ),
        "sharded_leaves": sum("tensor" in leaf.axes for leaf in plan),
        "cache_shard": list(runner.cache.layers[0].sharding.shard_shape(runner.cache.layers[0].shape)),
        "all_reduces": text.count("stablehlo.all_reduce"),
        "all_gathers": text.count("stablehlo.all_gather"),
        "compiled": runner.step._cache_size(),
    }


if __name__ == "__main__":
    for arguments in CASES:
        print(json.dumps(compare(*arguments)), flush=True)
