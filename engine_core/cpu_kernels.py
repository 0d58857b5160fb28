"""Whether a replica on a CPU has compiled kernels, and in which dtype it then holds weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine_core.compiled_library import COMPILERS
from engine_core.config import EngineConfig
from engine_core.kernels.cpu.choice import CpuKernels, choose_kernels
from engine_core.kernels.cpu.library import open_library
from engine_core.layers.linear import Numbers, choose_numbers, matmul
from engine_core.types import Numerics
from engine_core.weights import stored_dtype

_WORTH_BYTES = 256 << 20  # of weights; below, a step is short, and compiling and probing would only delay the start


def open_numbers(
    config: EngineConfig, dtype: str, platform: str, model_dir: Path, progress: Callable[[str], None]
) -> Numbers:
    """How to compute in `dtype` on a platform, on a CPU with the kernels of `open_cpu_kernels`."""
    numbers = choose_numbers(dtype, platform)
    kernels = open_cpu_kernels(config, dtype, model_dir, progress) if platform == "cpu" else None
    return numbers if kernels is None else replace(numbers, kernels=kernels, weight=kernels.weight)


def open_cpu_kernels(
    config: EngineConfig, dtype: str, model_dir: Path, progress: Callable[[str], None]
) -> CpuKernels | None:
    """Compile (once per machine) and probe (once per process).

    Strict numerics have none: what a probe chooses may differ between workers, and so would the bits.

    Args:
        config: `model.cpu_kernels` asks for them; they are kept beside `compile_cache`.
        dtype: of computation.
        model_dir: the checkpoint.
        progress: told a short sentence.

    Returns:
        None: XLA does all.
    """
    asked = config.model.cpu_kernels
    if asked == "xla" or not config.compile_cache or config.numerics is Numerics.STRICT:
        return None
    if asked == "auto" and sum(file.stat().st_size for file in model_dir.glob("*.safetensors")) < _WORTH_BYTES:
        return None
    progress("preparing kernels for this CPU")
    library = open_library(Path(config.compile_cache).expanduser() / "cpu_kernels", COMPILERS)
    if library is None:
        return None
    plain = choose_numbers(dtype, "cpu")
    return choose_kernels(library, dtype, stored_dtype(model_dir), lambda x, weight: matmul(x, weight, plain))
