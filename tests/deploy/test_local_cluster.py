"""`baton up` of deploy/ray/local.yaml with the real `ray up`: from files and secrets to an answer, and down again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.secret_files import write_secret
from tests.baton_process import READY_S, ROOT, free_port, until
from tests.deploy.ssh_node import SshNode

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

FILE = "deploy/ray/local.yaml"
KEY = {"authorization": "Bearer sk-local"}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SshNode]:
    running = SshNode(tmp_path)
    yield running
    running.end()


def prepare(directory: Path) -> int:
    """The files as they are, but for the ports; returns the gateway's."""
    ray, http = free_port(), free_port()
    changes = {"local.yaml": ("--port=6379", f"--port={ray}"), "local.toml": ("port = 8000", f"port = {http}")}
    (directory / "deploy/ray").mkdir(parents=True)
    for name, (old, new) in changes.items():
        text = (ROOT / "deploy/ray" / name).read_text()
        assert text.count(old) == 1
        (directory / "deploy/ray" / name).write_text(text.replace(old, new))
    secrets = directory / ".config/baton/local"
    for name in ("secret", "ray-token"):
        write_secret(secrets / name)
    (secrets / "api-keys").write_text("sk-local\n")
    return http


def test_up_status_and_down(node: SshNode, tmp_path: Path) -> None:
    port = prepare(tmp_path)
    path = f"{node.path}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(tmp_path),
    }

    def baton(*arguments: str) -> str:
        command = [sys.executable, "-m", "deploy.cli", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "no problem found" in baton("up", FILE)
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/readiness").status_code == 200
        except httpx.TransportError:
            return False

    until(is_ready, READY_S)
    asked = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}
    assert httpx.post(f"{url}/v1/completions", json=asked, timeout=60).status_code == 401
    reply = httpx.post(f"{url}/v1/completions", json=asked, headers=KEY, timeout=60)
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 8
    table = baton("status", "--cluster", FILE)
    assert "prefill-0  ready" in table and "decode-0   ready" in table
    assert "decode-0 (incarnation 1) is ready" in baton("logs", "--cluster", FILE, "--worker", "fleet")
    assert "prefill-0  ready" in baton("scale", "--decode", "1", "--cluster", FILE)
    checked = baton("doctor", "--cluster", FILE)
    assert "a Baton listens at" in checked and "ok    baton-decode" in checked and "fail" not in checked
    before = node.num_stops
    baton("down", FILE)
    assert node.num_stops > before
