"""Run by `test_moe_aot` with libtpu's environment: compiles for TPUs that are not there; prints JSON objects.

python -m tests.engine_core.moe_aot_worker            the layer
python -m tests.engine_core.moe_aot_worker narrow     the grouped matmul with every narrow dtype of weights
"""

from __future__ import annotations

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from engine_core.aot.compiler import tracing_for
from engine_core.config import Degrees
from engine_core.kernels.grouped_matmul import grouped_matmul
from engine_core.layers.linear import choose_numbers
from engine_core.layers.moe import MoeMlp, choose_experts
from engine_core.layers.params import Template
from engine_core.mesh import ROWS, make_mesh, sharding
from engine_core.models.spec import ExpertNames, MoeSpec

CASES = [
    ("v5e:2x2", Degrees(tp=4)),
    ("v5p:2x2x1", Degrees(ep=2)),
    ("v6e:2x2", Degrees(ep=2, tp=2)),
    ("tpu7x:2x2x1", Degrees(dp=2, ep=4)),
]
NARROW = ("int8", "float8_e4m3fn", "float8_e5m2")
ROWS_PER_SHARD, HIDDEN, SIZE, EXPERTS, PER_TOKEN = 64, 512, 256, 16, 4


def compile_layer(topology: str, degrees: Degrees) -> dict:
    """A MoE layer as `auto` runs it on a slice."""
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = make_mesh(degrees, devices)
    names = ExpertNames(block="mlp", gate="g", up="u", down="d")
    spec = MoeSpec(
        num_experts=EXPERTS,
        experts_per_token=PER_TOKEN,
        intermediate_size=SIZE,
        normalize=True,
        layers=(True,),
        names=names,
    )
    choice = choose_experts("auto", "bfloat16", "tpu")
    layer = Template(MoeMlp(spec, HIDDEN, choose_numbers("bfloat16", "tpu"), degrees, choice))
    rows = NamedSharding(mesh, P(ROWS))
    count = ROWS_PER_SHARD * degrees.row_shards
    leaves = [
        jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=sharding(mesh, param.axes)) for param in layer.params
    ]
    run = jax.shard_map(
        lambda leaves, x, valid: layer.bind(leaves)(x, valid),
        mesh=mesh,
        in_specs=([P(*param.axes) for param in layer.params], P(ROWS), P(ROWS)),
        out_specs=P(ROWS),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((count, HIDDEN), jnp.bfloat16, sharding=rows)
    valid = jax.ShapeDtypeStruct((count,), jnp.bool_, sharding=rows)
    compiled = jax.jit(run).lower(leaves, x, valid).compile()
    text = compiled.as_text()
    return {
        "topology": topology,
        "degrees": str(degrees),
        "by_columns": choice.splits_columns(spec, degrees),
        "kernels": len(re.findall(r"custom_call_target=\"tpu_custom_call\"", text)),
        "exchanges": len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)),
        "weight_copies": len(re.findall(rf"= bf16\[\d+,(?:2,)?(?:{HIDDEN}|{SIZE}),\d+\]\S* copy\(", text)),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def compile_narrow(topology: str, dtype: str) -> dict:
    """Gate and up of 16 experts with a scale for each column."""
    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    place = SingleDeviceSharding(device)

    def multiply(x, weights, scales, sizes):
        return grouped_matmul(x, weights, scales, sizes, out_dtype=jnp.bfloat16, implementation="tpu")

    arguments = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (
            ((ROWS_PER_SHARD, HIDDEN), jnp.bfloat16),
            ((EXPERTS, 2, HIDDEN, SIZE), dtype),
            ((EXPERTS, 2, SIZE), jnp.float32),
            ((EXPERTS,), jnp.int32),
        )
    ]
    with tracing_for(device):
        lowered = jax.jit(multiply, in_shardings=place, out_shardings=place).lower(*arguments)
    text = lowered.compile().as_text()
    kernels = len(re.findall(r"custom_call_target=\"tpu_custom_call\"", text))
    return {"topology": topology, "dtype": dtype, "kernels": kernels}


if __name__ == "__main__":
    if sys.argv[1:] == ["narrow"]:
        for topology, _ in CASES:
            for dtype in NARROW:
                print(json.dumps(compile_narrow(topology, dtype)), flush=True)
        sys.exit()
    for arguments in CASES:
        print(json.dumps(compile_layer(*arguments)), flush=True)
