"""Run on 4 virtual CPU devices by `test_tensor_parallel`: the parity check on a mesh; prints one JSON object per case.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.engine_core.tensor_parallel_worker

With the directory of compiled kernels as an argument (`test_cpu_kernels`): one case with them, weights in bfloat16.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from engine_core.compiled_library import COMPILERS
from engine_core.config import Degrees
from engine_core.kernels.cpu.choice import CpuKernels
from engine_core.kernels.cpu.library import open_library
from tests.engine_core.parity import GOLDEN, check_parity, load_expected

# qwen2 (with biases) and qwen3 have two KV heads: four devices hold two copies of each.
CASES = [("mistral", 4, False), ("qwen2", 4, True), ("qwen3", 4, False), ("llama", 2, True)]


def check(case: str, tp: int, scan: bool, kernels: CpuKernels | None = None) -> dict:
    runner = check_parity(
        GOLDEN / case, load_expected(case), scan=scan, degrees=Degrees(tp=tp), experts="auto", kernels=kernels
    )
    plan = jax.tree.leaves(runner.model.plan())
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(runner.params)]
    cache = runner.cache.layers[0]
    text = runner.step.lower(runner.params, runner.cache, runner.slots, runner.inputs([], 4, 4)).as_text()
    return {
        "case": case,
        "tp": tp,
        "scan": scan,
        "split_leaves": sum(
            int(np.prod(shape)) * tp == int(np.prod(leaf.shape)) for leaf, shape in zip(plan, shapes, strict=True)
        ),
        "sharded_leaves": sum("tensor" in leaf.axes for leaf in plan),
        "held": Counter(str(leaf.dtype) for leaf in jax.tree.leaves(runner.params) if leaf.ndim == 2),
        "cache_shard": list(cache.sharding.shard_shape(cache.shape)),
        "all_reduces": text.count("stablehlo.all_reduce"),
        "all_gathers": text.count("stablehlo.all_gather"),
        "compiled": runner.step._cache_size(),
    }


def narrow_kernels(directory: Path) -> CpuKernels:
    library = open_library(directory, COMPILERS)
    assert library is not None
    return CpuKernels(library=library, rows=(1, 4, 16, 64, 256), weight="bfloat16")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(check(*CASES[2], narrow_kernels(Path(sys.argv[1])))), flush=True)
    else:
        for arguments in CASES:
            print(json.dumps(check(*arguments)), flush=True)
