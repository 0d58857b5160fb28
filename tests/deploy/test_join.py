"""Baton on a Ray cluster that somebody else started: with `baton serve --ray-address`, and as a Serve application."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.baton_process import ROOT, Baton, free_port
from tests.deploy.ray_head import Head

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

RESOURCES = {"baton-gateway": 1, "baton-prefill": 1, "baton-decode": 1}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    running = Head(tmp_path_factory.mktemp("head"), RESOURCES)
    yield running
    running.stop()


def workers(port: int) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/workers", timeout=5) as reply:
        return json.load(reply)


def test_serve_joins_and_leaves(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in head.settings.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    flags = ("--fleet.host", "node", "--fleet.pool_resources", "true", "--log_dir", str(tmp_path / "logs"))
    baton = Baton(tmp_path, port, "-m", "tests.deploy.serve_fake", str(port), str(tmp_path), head.address, *flags)
    try:
        assert baton.wait_ready() == f"Baton is ready: http://127.0.0.1:{port}/v1\n", baton.log.read_text()
        assert workers(port) == [["decode-0", 1], ["prefill-0", 1]]
        status = json.loads(baton.cli("status", "--json").stdout)
        assert status["ready"] and len(status["members"]) == 2
        scaled = baton.cli("scale", "--decode", "2", "--timeout", "3")
        assert scaled.returncode == 1, "the cluster offers one baton-decode: a second worker finds no place"
        assert baton.cli("scale", "--decode", "1", "--no-wait").returncode == 0
        (tmp_path / "doctor.toml").write_text("[fleet]\npool_resources = true\ndecode = 2\n")
        doctor = baton.cli("doctor", "--ray-address", head.address, "--config", f"{tmp_path / 'doctor.toml'}", "--json")
        found = {finding["check"]: finding for finding in json.loads(doctor.stdout)}
        assert doctor.returncode == 1 and found["baton-decode"]["fix"].startswith("more nodes that offer baton-decode")
        assert found["ray everywhere"]["text"].endswith("on 1 nodes")
        assert not [check for check in found if check.endswith(("clock skew", "answers"))]
        assert any(check.endswith(" jax") for check in found), found.keys()
        logs = baton.cli("logs", "--worker", "fleet", "-n", "5")
        assert logs.returncode == 0 and "decode-0 (incarnation 1) is ready" in logs.stdout
        assert "has no log of 'nobody', but of: " in baton.cli("logs", "--worker", "nobody").stderr
        baton.signal(signal.SIGTERM)
        assert baton.process.wait(60) == 0, baton.log.read_text()
        assert len(head.processes("gcs_server")) == 1, "the cluster is not ours to end"
    finally:
        baton.close()


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    port = free_port()
    baton = Baton(tmp_path, port, "-m", "tests.deploy.serve_fake", str(port), str(tmp_path), f"127.0.0.1:{free_port()}")
    try:
        assert baton.process.wait(120) == 2
        assert "Error: no Ray cluster answers at" in baton.log.read_text()
    finally:
        baton.close()


def test_the_serve_application(head: Head, tmp_path: Path) -> None:
    port = free_port()
    environment = {**os.environ, **head.settings, "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "tests.deploy.app_fake", str(port), str(tmp_path), head.address]
    with (tmp_path / "log").open("w") as log:
        app = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert app.stdin is not None and app.stdout is not None
    try:
        assert app.stdout.readline() == "running\n", (tmp_path / "log").read_text()
        deadline = time.monotonic() + 60
        while workers(port) != [["decode-0", 1], ["prefill-0", 1]]:
            assert time.monotonic() < deadline, workers(port)
            time.sleep(0.2)
        status = [sys.executable, "-m", "deploy.cli", "status", "--ray-address", head.address]
        shown = subprocess.run(status, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(f"Ray cluster {head.address}  ready  (wanted: 1 prefill, 1 decode)\n")
        app.stdin.write("\n")
        app.stdin.flush()
        assert app.stdout.readline() == "deleted\n", (tmp_path / "log").read_text()
        assert app.wait(60) == 0
    finally:
        app.kill()
        app.wait()
        app.stdin.close()
        app.stdout.close()
