"""Would hand-written overlap of sums over the tensor axis pay? The compiler's own estimate for the MLP of one layer.

XLA runs an all-reduce of v6e by itself, while nothing else does. Two ways to change that: the second product in
pieces, whose sums travel a ring meanwhile (permutes are asynchronous), and two half batches, of which one is computed
while the other is added up.

python -m benchmarks.tpu_static.overlap --tokens 512 2048
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engine_core.aot.compiler import describe_devices
from engine_core.aot.environment import compiler_environment, require_libtpu
from engine_core.aot.hlo import Collective
from engine_core.aot.roofline import ASSUMED, collective_seconds
from engine_core.aot.topology import find_topology
from engine_core.config import Degrees
from engine_core.mesh import TENSOR, make_mesh

_SLICE, _HIDDEN, _SIZE, _DEVICES = "v6e-8", 5120, 25600, 8  # Qwen3-32B
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 1 << 40
Mlp = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def plain(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """[T, D]: as the engine does it."""
    added: jax.Array = jax.lax.psum(jax.nn.silu(x @ up) @ down, TENSOR)
    return added


def ring(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """A device ends up with the sum of its piece of the tokens; pieces are gathered at the end."""
    hidden = jax.nn.silu(x @ up)
    size = x.shape[0] // _DEVICES
    here = jax.lax.axis_index(TENSOR)
    links = [(device, (device + 1) % _DEVICES) for device in range(_DEVICES)]

    def piece(steps: int) -> jax.Array:
        start = (here - steps) % _DEVICES * size
        return jax.lax.dynamic_slice_in_dim(hidden, start, size) @ down

    total = piece(1)
    for steps in range(2, _DEVICES + 1):
        total = jax.lax.ppermute(total, TENSOR, links) + piece(steps)
    gathered: jax.Array = jax.lax.all_gather(total, TENSOR, axis=0, tiled=True)
    return gathered


def halves(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Two sums, each of which could run beside the other's products."""
    return jnp.concatenate([plain(half, up, down) for half in jnp.split(x, 2)])


def measure(name: str, mlp: Mlp, tokens: int) -> dict[str, Any]:
    """Compile one way for the slice."""
    topology = find_topology(_SLICE)
    mesh = make_mesh(Degrees(tp=_DEVICES), describe_devices(topology))
    specs = (P(), P(None, TENSOR), P(TENSOR, None))
    shapes = ((tokens, _HIDDEN), (_HIDDEN, _SIZE), (_SIZE, _HIDDEN))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    split = jax.shard_map(mlp, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    text = jax.jit(split).lower(*arguments).compile().as_text() or ""
    cycles = sum(count for count in map(int, _CYCLES.findall(text)) if count < _UNKNOWN)
    size = 2 * tokens * _HIDDEN
    return {
        "way": name,
        "tokens": tokens,
        "compute_us": cycles / topology.generation.clock_hz * 1e6,
        "all_reduce_us": collective_seconds({"all-reduce": Collective(1, size, size)}, topology, ASSUMED) * 1e6,
        "all_reduces": len(re.findall(r" all-reduce\(", text)),
        "asynchronous_permutes": len(re.findall(r" collective-permute-start\(", text)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compile in a process with libtpu's environment; print a table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_static.overlap", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="of a step, multiples of 8")
    parser.add_argument("--here", action="store_true", help="in this process, and print JSON")
    args = parser.parse_args(argv)
    if args.here:
        ways = {"plain": plain, "ring": ring, "halves": halves}
        print(json.dumps([measure(name, way, tokens) for tokens in args.tokens for name, way in ways.items()]))
        return 0
    require_libtpu()
    tokens = [str(count) for count in args.tokens]
    command = [sys.executable, "-m", "benchmarks.tpu_static.overlap", "--here", "--tokens", *tokens]
    done = subprocess.run(
        command, env=compiler_environment(os.environ, []), capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        return 1
    rows = json.loads(done.stdout.splitlines()[-1])
    print(f"{'tokens':>6} {'way':8} {'compute us':>10} {'all-reduce us':>13} {'sums':>5} {'permutes':>8}")
    for row in rows:
        times = f"{row['compute_us']:10.1f} {row['all_reduce_us']:13.1f}"
        print(f"{row['tokens']:6} {row['way']:8} {times} {row['all_reduces']:5} {row['asynchronous_permutes']:8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
