"""A full disk costs log lines, never a request."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest

from deploy.log import log_to_file


def test_a_full_disk_loses_lines_and_raises_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "decode-0.log").symlink_to(full)
    root = logging.getLogger()
    before = list(root.handlers), root.level
    try:
        log_to_file(tmp_path, "decode-0")
        for _ in range(1000):
            logging.getLogger("baton").warning("a line that finds no room: %s", "x" * 100)
    finally:
        for handler in set(root.handlers) - set(before[0]):
            root.removeHandler(handler)
            with contextlib.suppress(OSError):
                handler.close()
        root.setLevel(before[1])
    assert "No space left" in capsys.readouterr().err
