import os
from pathlib import Path

import pytest

from deploy import run_file
from deploy.ray_local import Process, process
from deploy.run_file import RunFile
from engine_core.errors import ConfigError


def running(port: int, server: Process | None = None) -> RunFile:
    me = process(os.getpid())
    assert me is not None
    return RunFile(server or me, f"http://127.0.0.1:{port}/v1", "demo", "127.0.0.1:1", "/token", "/logs")


def test_find_the_only_one_or_the_one_on_the_port(tmp_path: Path) -> None:
    run_file.write(tmp_path, 8000, running(8000))
    assert run_file.find(tmp_path, None) == run_file.find(tmp_path, 8000) == running(8000)
    run_file.write(tmp_path, 8001, running(8001))
    assert run_file.find(tmp_path, 8001) == running(8001)
    with pytest.raises(ConfigError, match=r"choose one with --port .*8000, 8001"):
        run_file.find(tmp_path, None)


def test_dead_and_broken_ones_do_not_count(tmp_path: Path) -> None:
    run_file.write(tmp_path, 8000, running(8000, Process(os.getpid(), 1)))
    (tmp_path / "8001.json").write_text("{")
    with pytest.raises(ConfigError, match="No Baton runs on port 8000"):
        run_file.find(tmp_path, 8000)
    with pytest.raises(ConfigError, match="No Baton runs "):
        run_file.find(tmp_path / "absent", None)
