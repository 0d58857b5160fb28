"""Compiles the kernels for this machine, keeps the library, and makes it known to XLA."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.ffi

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_SOURCES = ("common.h", "matmul.cc", "attention.cc")
COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order."""
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-w", "-shared", "-fPIC")
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Library:
    """Names of registered call targets."""

    matmul: str
    attention: str


def open_library(directory: Path, compilers: Sequence[str]) -> Library | None:
    """Register the kernels with XLA, compiling them where `directory` lacks them.

    Args:
        directory: where libraries are kept, of this user only. Processes that start at once may share it.
        compilers: commands to try.

    Returns:
        None where there is no compiler, or it fails; the log says why.
    """
    identity = _identity()
    path = directory / f"baton_cpu_{identity}.so"
    try:
        if not path.exists() and not _compile(path, compilers):
            return None
        functions = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("compiled kernels for the CPU cannot be had, XLA does all: %s", error)
        return None
    library = Library(f"baton_matmul_{identity}", f"baton_attention_{identity}")
    for name, function in ((library.matmul, functions.BatonMatmul), (library.attention, functions.BatonAttention)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return library


def _identity() -> str:
    """Of sources, flags, XLA's interface and this CPU: a library, or an executable that calls it, fits only its own."""
    interface = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    files = [*(_HERE / name for name in _SOURCES), interface]
    parts = [*(file.read_bytes() for file in files), " ".join(_FLAGS).encode(), _cpu().encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _cpu() -> str:
    """What this CPU is and can do."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    wanted = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(wanted))])


def _compile(path: Path, compilers: Sequence[str]) -> bool:
    compiler = next((found for name in compilers if (found := shutil.which(name))), None)
    if compiler is None:
        logger.info("no C++ compiler for the CPU's kernels: XLA does all")
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch, path.name)
        sources = [str(_HERE / name) for name in _SOURCES if name.endswith(".cc")]
        command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            logger.warning(
                "%s cannot compile the CPU's kernels, XLA does all: %s", compiler, done.stderr.strip()[-500:]
            )
            return False
        os.replace(built, path)  # at once, so that another process finds all of it or nothing
    return True
