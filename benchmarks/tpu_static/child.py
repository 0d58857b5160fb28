"""The process that compiles one kernel: `python -m benchmarks.tpu_static.child KERNEL GENERATION SHAPE DUMP OUT`.

libtpu reads its flags once, so each kernel has a process of its own. OUT receives one JSON object: an `Estimate`, or
the error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from benchmarks.tpu_static.bundles import ScheduleError, read_schedules
from benchmarks.tpu_static.case import Builder
from benchmarks.tpu_static.estimate import estimate
from benchmarks.tpu_static.kernels import KERNELS
from engine_core.aot.compiler import describe_devices, tracing_for
from engine_core.aot.topology import topologies
from engine_core.errors import ConfigError


def main(kernel: str, generation: str, shape: str, dump: str, out: str) -> None:
    """Compile, read, write."""
    Path(out).write_text(json.dumps(_measure(kernel, generation, shape, Path(dump))))


def _measure(kernel: str, generation: str, shape: str, dump: Path) -> dict[str, Any]:
    slice_ = next(topology for topology in topologies() if topology.generation.name == generation)
    try:
        build = _find(kernel)
        device = describe_devices(slice_)[0]
        with tracing_for(device):
            case = build(slice_.generation, shape)
            place = SingleDeviceSharding(device)
            jitted = jax.jit(case.function, in_shardings=place, out_shardings=place, donate_argnums=case.donate)
            lowered = jitted.lower(*case.arguments)
        start, start_cpu = time.monotonic(), time.process_time()
        memory = lowered.compile().memory_analysis()
        seconds, cpu_seconds = time.monotonic() - start, time.process_time() - start_cpu
        result = asdict(estimate(case, read_schedules(dump), slice_.generation))
    except (ConfigError, ScheduleError) as error:
        return {"error": str(error)}
    except jax.errors.JaxRuntimeError as error:  # what the compiler refuses: too much VMEM, an unsupported operation
        return {"error": str(error).splitlines()[0]}
    return {
        **result,
        "compile_s": round(seconds, 2),
        "compile_cpu_s": round(cpu_seconds, 2),
        "flops": case.flops,
        "hbm_bytes": case.hbm_bytes,
        "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
        "libtpu": importlib.metadata.version("libtpu"),
        "jax": jax.__version__,
    }


def _find(kernel: str) -> Builder:
    module, _, name = KERNELS.get(kernel, kernel).partition(":")
    if not name:
        raise ConfigError(f"--kernel must be one of {', '.join(KERNELS)}, or module:function; not {kernel!r}")
    try:
        build: Builder = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--kernel {kernel}: {error}") from error
    return build


if __name__ == "__main__":
    main(*sys.argv[1:])
