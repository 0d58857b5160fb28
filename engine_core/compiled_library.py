"""C++ that is compiled for the machine at hand when it is first needed, and kept: a system compiler, or none at all."""

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

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order."""
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-w", "-shared", "-fPIC")
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Sources:
    """Of one library.

    Attributes:
        name: of its files; ASCII without spaces.
        purpose: what it is for, for the log: "the CPU's kernels".
        otherwise: what happens without it: "XLA does all".
        files: those to compile.
        headers: that these include and that are not the compiler's own.
        flags: besides those of all libraries.
    """

    name: str
    purpose: str
    otherwise: str
    files: tuple[Path, ...]
    headers: tuple[Path, ...]
    flags: tuple[str, ...]

    def identity(self) -> str:
        """Of sources, flags and this CPU: a library fits only its own."""
        parts = [*(file.read_bytes() for file in (*self.headers, *self.files))]
        parts += [" ".join((*_FLAGS, *self.flags)).encode(), _cpu().encode()]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def find_compiler(compilers: Sequence[str]) -> str | None:
    """Path of the first of these commands that there is."""
    return next((found for name in compilers if (found := shutil.which(name))), None)


def build_library(sources: Sources, directory: Path, compilers: Sequence[str]) -> Path | None:
    """A library, compiled where `directory` lacks it.

    Args:
        directory: where libraries are kept, of this user only. Processes that start at once may share it.
        compilers: commands to try.

    Returns:
        Its path, whose name holds the identity. None where there is no compiler, or it fails: the log says why.
    """
    try:
        path = directory / f"{sources.name}_{sources.identity()}.so"
        return path if path.exists() or _compile(sources, path, compilers) else None
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("%s cannot be compiled, %s: %s", sources.purpose, sources.otherwise, error)
        return None


def load_library(sources: Sources, path: Path, *, keeps_lock: bool) -> ctypes.CDLL | None:
    """What was built. None where it cannot be loaded: the log says why.

    Args:
        keeps_lock: whether calls keep the interpreter's lock: those that are short, or touch Python's objects.
    """
    try:
        return (ctypes.PyDLL if keeps_lock else ctypes.CDLL)(str(path))
    except OSError as error:
        logger.warning("%s cannot be loaded, %s: %s", sources.purpose, sources.otherwise, error)
        return None


def _cpu() -> str:
    """What this CPU is and can do."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    wanted = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(wanted))])


def _compile(sources: Sources, path: Path, compilers: Sequence[str]) -> bool:
    compiler = find_compiler(compilers)
    if compiler is None:
        logger.info("no C++ compiler for %s: %s", sources.purpose, sources.otherwise)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch, path.name)
        command = [compiler, *_FLAGS, *sources.flags, *map(str, sources.files), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            reason = done.stderr.strip()[-500:]
            logger.warning("%s cannot compile %s, %s: %s", compiler, sources.purpose, sources.otherwise, reason)
            return False
        os.replace(built, path)  # at once, so that another process finds all of it or nothing
    return True
