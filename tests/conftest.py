"""For all tests: what one of them has compiled, the others load."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine_core.replica_loader import use_compile_cache


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One for this run, of all processes of pytest: the same small models are compiled again and again."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    use_compile_cache(str(Path(directory, "xla")))
