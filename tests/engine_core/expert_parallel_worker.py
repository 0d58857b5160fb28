"""Run on 8 virtual CPU devices by `test_expert_parallel`: the parity check on meshes; prints one JSON object per case.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.engine_core.expert_parallel_worker
"""

from __future__ import annotations

import json

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from engine_core.config import Degrees
from engine_core.layers.linear import choose_numbers
from engine_core.layers.moe import MoeMlp, choose_experts
from engine_core.layers.params import Template
from engine_core.mesh import ROWS, make_mesh
from engine_core.models.spec import ExpertNames, MoeSpec
from tests.engine_core.parity import GOLDEN, check_parity, load_expected

CASES = [
    ("qwen3_moe", Degrees(dp=2, ep=2, tp=2), "grouped", False),
    ("qwen3_moe", Degrees(ep=8), "grouped", True),
    ("mixtral", Degrees(ep=5), "fused", True),
    ("llama", Degrees(dp=2, tp=2), "auto", True),
]
LAYERS = [
    (Degrees(ep=8), "grouped"),
    (Degrees(tp=8), "grouped"),
    (Degrees(dp=2, ep=2, tp=2), "grouped"),
    (Degrees(dp=2, ep=4), "fused"),
]
EXPERTS, HIDDEN, SIZE, ROWS_PER_SHARD = 16, 32, 24, 5


def check(case: str, degrees: Degrees, experts: str, scan: bool) -> dict:
    runner = check_parity(GOLDEN / case, load_expected(case), scan=scan, degrees=degrees, experts=experts)
    plan = jax.tree.leaves(runner.model.plan())
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(runner.params)]
    parts = [
        int(np.prod([{"tensor": degrees.tp, "expert": degrees.ep}.get(axis, 1) for axis in leaf.axes])) for leaf in plan
    ]
    cache = runner.cache.layers[0]
    return {
        "case": case,
        "degrees": str(degrees),
        "devices": degrees.num_devices,
        "experts": experts,
        "split_right": all(
            int(np.prod(shape)) * count == int(np.prod(leaf.shape))
            for leaf, shape, count in zip(plan, shapes, parts, strict=True)
        ),
        "expert_leaves": sum("expert" in leaf.axes for leaf in plan),
        "cache_part": cache.size // int(np.prod(cache.sharding.shard_shape(cache.shape))),
        "compiled": runner.step._cache_size(),
    }


def check_layer(degrees: Degrees, experts: str) -> dict:
    """A MoE layer on a mesh against the same layer on one device."""
    names = ExpertNames(block="mlp", gate="g", up="u", down="d")
    spec = MoeSpec(
        num_experts=EXPERTS,
        experts_per_token=3,
        intermediate_size=SIZE,
        normalize=True,
        layers=(True,),
        names=names,
    )
    numbers, choice = choose_numbers("float32", "cpu"), choose_experts(experts, "float32", "cpu")
    rng = np.random.default_rng(3)
    whole = Template(MoeMlp(spec, HIDDEN, numbers, Degrees(), choice))
    split = Template(MoeMlp(spec, HIDDEN, numbers, degrees, choice))
    leaves = [rng.standard_normal(param.shape).astype(np.float32) for param in whole.params]
    mesh = make_mesh(degrees, jax.devices())
    run = jax.jit(
        jax.shard_map(
            lambda leaves, x, valid: split.bind(leaves)(x, valid),
            mesh=mesh,
            in_specs=([P(*param.axes) for param in split.params], P(ROWS), P(ROWS)),
            out_specs=P(ROWS),
            check_vma=False,
        )
    )
    one = jax.jit(lambda leaves, x, valid: whole.bind(leaves)(x, valid))
    rows = ROWS_PER_SHARD * degrees.row_shards
    error = scale = 0.0
    router = next(i for i, param in enumerate(split.params) if len(param.shape) == 2)
    for load in ("random", "skewed", "padded"):
        x = rng.standard_normal((rows, HIDDEN)).astype(np.float32)
        if load == "skewed":  # all rows to the last experts
            x = np.tile(leaves[router][-1], (rows, 1)) + 0.1 * x
        valid = np.arange(rows) < (rows // 3 if load == "padded" else rows)
        wanted, found = np.asarray(one(leaves, x, valid)), np.asarray(run(leaves, x, valid))
        assert not wanted[~valid].any()
        error, scale = max(error, float(np.abs(wanted - found).max())), max(scale, float(np.abs(wanted).max()))
    return {"layer": str(degrees), "tp": degrees.tp, "experts": experts, "error": error, "scale": scale}


if __name__ == "__main__":
    for arguments in CASES:
        print(json.dumps(check(*arguments)), flush=True)
    for arguments in LAYERS:
        print(json.dumps(check_layer(*arguments)), flush=True)
