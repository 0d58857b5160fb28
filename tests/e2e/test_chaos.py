"""A short `baton chaos`: a real cluster, killed, frozen, drained and cut under load, and nothing comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.baton_process import ROOT
from tests.e2e.model import make_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_a_short_chaos_changes_nothing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny")
    command = [sys.executable, "-m", "deploy.cli", "chaos", "--minutes", "0.3", "--prefill", "1", "--requests", "12"]
    command += ["--checkpoint", str(checkpoint), "--seed", "39", "--json"]
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": "/tmp"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["mismatched"], report["lost"], report["leaked"], report["changed"]) == (0, 0, 0, 0)
    assert report["streams"] > 12 and report["faults"] >= 3
    assert report["fault_kinds"]["kill gateway"], "the first of this seed"


@pytest.mark.parametrize("flags", [["--minutes", "0"], ["--decode", "0"], ["--nonsense"]])
def test_bad_flags_are_refused(flags: list[str]) -> None:
    command = [sys.executable, "-m", "deploy.cli", "chaos", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error" in done.stderr
