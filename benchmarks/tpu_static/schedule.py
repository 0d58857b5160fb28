"""One kernel compiled in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_core.aot.environment import compiler_environment, schedule_dump_flags

_LOG_LINES = 8


def measure(kernel: str, generation: str, shape: str, dump: Path | None, timeout_s: float) -> dict[str, Any]:
    """Compile a kernel and read its schedule.

    Args:
        kernel: short name or `module:function`.
        generation: "v6e".
        shape: a name that the kernel knows.
        dump: where the compiler's listings shall stay; None: nowhere.
        timeout_s: for all of it.

    Returns:
        An `Estimate` as plain JSON, with `compile_s`, `compile_cpu_s` (all threads), `libtpu` and `jax`; or an `error`.
    """
    with tempfile.TemporaryDirectory(prefix="baton-tpu-") as scratch:
        directory = Path(scratch, "dump") if dump is None else dump
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("*.txt"):
            stale.unlink()
        out = Path(scratch, "out.json")
        return {"kernel": kernel, "generation": generation, "shape": shape} | _run(
            [kernel, generation, shape, str(directory), str(out)], schedule_dump_flags(str(directory)), out, timeout_s
        )


def _run(arguments: Sequence[str], flags: Sequence[str], out: Path, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.tpu_static.child", *arguments]
    environment = compiler_environment(os.environ, flags)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled within {timeout_s:.0f} s"}
    if done.returncode or not out.is_file():
        tail = "\n".join(done.stderr.strip().splitlines()[-_LOG_LINES:])
        return {"error": f"the compiling process ended with status {done.returncode}: {tail}"}
    result: dict[str, Any] = json.loads(out.read_text())
    return result
