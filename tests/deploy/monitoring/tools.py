"""Debian's Prometheus, when it is there (`make system-packages`)."""

from __future__ import annotations

import shutil

import pytest

HINT = "is not installed; `make system-packages` installs it where apt-get can"


def tool(name: str) -> str:
    """Path of a program; skips the test where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} {HINT}")
    return path
