"""Where jax may look for devices. Each choice is made once per process, so each test makes it in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_core.platform_choice import has_tpu

CHOICE = """
import jax
from engine_core.platform_choice import choose_platforms
choose_platforms()
print(jax.config.jax_platforms)
"""


def chosen(**variables: str) -> str:
    """What a new process chooses, on a machine without accelerator."""
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", CHOICE], env=inherited | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_cpu_where_there_is_nothing_else() -> None:
    assert chosen() == "cpu"


def test_the_users_choice_stands() -> None:
    assert chosen(JAX_PLATFORMS="tpu,cpu") == "tpu,cpu"


def test_a_plugin_of_another_accelerator_is_left_to_jax(tmp_path: Path) -> None:
    package = tmp_path / "some_plugin-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[jax_plugins]\nsome = some_plugin\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    assert chosen(PYTHONPATH=path) == "None"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [([], False), (["null", "accelerometer", "vfio/vfio"], False), (["accel0"], True), (["vfio/vfio", "vfio/3"], True)],
)
def test_device_nodes_of_a_tpu(tmp_path: Path, nodes: list[str], expected: bool) -> None:
    for node in nodes:
        (tmp_path / node).parent.mkdir(exist_ok=True)
        (tmp_path / node).touch()
    assert has_tpu(tmp_path) is expected
