"""The hand-off between workers that are split over two devices."""

from __future__ import annotations

import subprocess
import sys


def test_split_workers_hand_over_and_agree():
    command = [sys.executable, "-m", "tests.integration.tensor_parallel_cluster"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for apart, together in lines:
        assert len(apart.split()) == 12 and apart == together
