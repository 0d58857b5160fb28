"""Run twice at once by `test_weights`, as the two hosts of a slice: what each reads of a checkpoint.

python -m tests.engine_core.two_host_loader COORDINATOR_PORT PROCESS_ID
"""

from __future__ import annotations

import json
import math
import sys

import jax
import numpy as np

from engine_core import weights
from engine_core.config import Degrees
from engine_core.layers.linear import choose_numbers
from engine_core.layers.moe import choose_experts
from engine_core.mesh import make_mesh, sharding
from engine_core.models.decoder import Decoder
from engine_core.models.registry import load_spec
from tests.engine_core.parity import GOLDEN

CASES = [("mistral", Degrees(tp=4)), ("qwen3_moe", Degrees(ep=2, tp=2))]


def load(case: str, degrees: Degrees) -> dict:
    directory = GOLDEN / case
    numbers, experts = choose_numbers("float32", "cpu"), choose_experts("auto", "float32", "cpu")
    model = Decoder(load_spec(directory), numbers, degrees=degrees, experts=experts, scan=True)
    mesh = make_mesh(degrees, jax.devices())
    sizes: list[int] = []
    read = weights._read_stack

    def counted(*arguments) -> np.ndarray:
        piece = read(*arguments)
        sizes.append(piece.size)
        return piece

    weights._read_stack = counted
    params = weights.load_params(directory, model, mesh, None)
    weights._read_stack = read
    leaves = list(zip(jax.tree.leaves(model.plan()), jax.tree.leaves(params), strict=True))
    own = 0
    for plan, leaf in leaves:
        parts = sharding(mesh, plan.axes).addressable_devices_indices_map(plan.shape)
        own += len({str(part) for part in parts.values()}) * math.prod(leaf.sharding.shard_shape(leaf.shape))
    return {
        "case": case,
        "devices": [jax.local_device_count(), jax.device_count()],
        "whole": sum(math.prod(plan.shape) for plan, _ in leaves),
        "own": own,
        "read": sum(sizes),
        "largest": max(sizes),
        "held": sum(shard.data.size for _, leaf in leaves for shard in leaf.addressable_shards),
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
    for arguments in CASES:
        print(json.dumps(load(*arguments)), flush=True)
    jax.distributed.shutdown()
