"""Tests that compile for TPUs with libtpu: the marks, and a child process to do it in."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODELS = Path(__file__).parent / "model_configs"
compiles = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


def run_cli(*argv: str) -> subprocess.CompletedProcess[str]:
    """`baton` with these arguments."""
    command = [sys.executable, "-m", "deploy.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def plan(model: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of `baton plan`."""
    done = run_cli("plan", "--model", str(model), "--json", *flags)
    assert done.returncode in (0, 3), done.stderr
    return done.returncode, json.loads(done.stdout)
