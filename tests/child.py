"""Tests that need a process of their own, as jax and libtpu read their environment once."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def lines_of(
    module: str, environment: Mapping[str, str], *arguments: str, timeout_s: float | None
) -> list[dict[str, Any]]:
    """The lines of JSON that a module prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
