"""`baton serve` as a subprocess, for the tests of whole clusters."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.ray_local import Process, process

ROOT = Path(__file__).parents[1]
READY_S = 180  # a machine may be busy
STOP_S = 40


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
    return value


class Baton:
    """A `baton serve` in a subprocess, leader of its own process group.

    Args:
        home: its home directory.
        port: of its endpoint.
        command: arguments of the Python interpreter.
    """

    def __init__(self, home: Path, port: int, *command: str) -> None:
        self.home = home
        self.port = port
        self.environment = {**os.environ, "HOME": str(home), "TMPDIR": "/tmp"}
        self.log = home / "stderr"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self) -> str:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], READY_S)
        assert readable, self.log.read_text()
        return self.process.stdout.readline().decode()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            return json.load(response)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.cli", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60)

    def status(self) -> Any:
        return json.loads(self.cli("status", "--json").stdout)

    def family(self) -> list[Process]:
        """This Baton and every process below it."""
        parents = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
        found, queue = [], [self.process.pid]
        while queue:
            pid = queue.pop()
            found.append(process(pid))
            queue += [child for child, parent in parents.items() if parent == pid]
        return [member for member in found if member is not None]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, send: Callable[[], None], within_s: float) -> int:
        """Send a signal; returns the exit status, once everything that belonged to it is gone."""
        family = self.family()
        run_file = next((self.home / ".cache/baton/run").glob("*.json"))
        run_dir = Path(json.loads(run_file.read_text())["token_path"]).parent
        send()
        status = self.process.wait(within_s)
        until(lambda: not [member for member in family if process(member.pid) == member], 5)
        assert not run_dir.exists() and not run_file.exists()
        return status

    def close(self) -> None:
        """Whatever state it is in: end it, by force if need be."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                for member in self.family():
                    os.kill(member.pid, signal.SIGKILL)
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
