"""Engines whose sequences lie on several row shards say what one device says, through both kinds of hand-over."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.integration.row_shards_cluster import CASES


@pytest.mark.parametrize("case", list(CASES))
def test_tokens_are_those_of_one_device(case, tmp_path):
    command = [sys.executable, "-m", "tests.integration.row_shards_cluster", case, str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split(" | ") for line in done.stdout.splitlines()]
    assert len(lines) == 8
    for apart, together, expected in lines:
        assert len(expected.split()) == 12
        assert apart == together == expected
