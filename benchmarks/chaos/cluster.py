"""The cluster of a chaos run: a real `baton serve` on this machine, and a hand on its fleet."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy import ray_local, run_file
from engine_core.types import Role

START_S = 240.0
STOP_S = 60.0
LISTENS, OPEN = "0A", ("01", "08")  # states in /proc/net/tcp; open: established, or waiting for our end to close


class Cluster:
    """Processes of one run.

    Args:
        model_dir: of the checkpoint, in which `station.FILE` lies.
        directory: for its log.
        num_gateways: that it shall have.
        flags: of `baton serve`.
    """

    def __init__(self, model_dir: Path, directory: Path, num_gateways: int, flags: Sequence[str]) -> None:
        self.port = _free_port()
        self.num_gateways = num_gateways
        flags = ["--fleet.gateways", str(num_gateways), *flags]
        self.log = directory / "serve.log"
        command = [sys.executable, "-m", "benchmarks.chaos.serve", str(model_dir), "--port", str(self.port), *flags]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.model = ""
        self._fleet: Any = None

    @property
    def url(self) -> str:
        """Of the OpenAI API."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        """Return once it is ready. Raises RuntimeError with its log where it never will be."""
        deadline = time.monotonic() + START_S
        while "Baton is ready" not in self.log.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the cluster did not start:\n{self.log.read_text()[-3000:]}")
            await asyncio.sleep(0.1)
        run = run_file.find(run_file.DIRECTORY.expanduser(), self.port)
        self.model = run.model
        ray_local.prepare(Path(run.token_path))
        fleet = importlib.import_module("deploy.fleet")
        ray = importlib.import_module("ray")
        ray.init(address=run.ray_address, namespace=fleet.NAMESPACE, log_to_driver=False, logging_level="ERROR")
        self._fleet = fleet.FleetClient.find()

    async def status(self) -> Any:
        """What the fleet says: see `FleetStatus`."""
        return await self._fleet.status()

    async def scale(self, role: Role, count: int) -> None:
        """Ask for so many workers."""
        await self._fleet.scale({role: count})

    async def until_ready(self, timeout_s: float) -> None:
        """Every wanted worker and gateway serves, and no other is left."""
        async with asyncio.timeout(timeout_s):
            while not self.is_whole(await self.status()):  # noqa: ASYNC110
                await asyncio.sleep(0.2)

    def is_whole(self, status: Any) -> bool:
        """Whether, by this status, every wanted worker serves and no other is left; and every gateway listens."""
        return bool(status.is_settled) and len(self.gateways()) == self._num_sockets(LISTENS) == self.num_gateways

    def gateways(self) -> list[int]:
        """Process ids of those that live."""
        return [one.pid for one in ray_local.descendants() if b"ServeReplica" in _command(one.pid)]

    def is_gone(self, pid: int) -> bool:
        """Whether a process has closed its sockets: the last of the dying, whose command is empty before that."""
        return ray_local.process(pid) is None

    def num_client_sockets(self) -> int:
        """Connections that the gateways still hold open for clients."""
        return self._num_sockets(*OPEN)

    def _num_sockets(self, *states: str) -> int:
        """At the gateways' port; each gateway has a listening one of its own."""
        wanted = f":{self.port:04X}"
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(row[1].endswith(wanted) and row[3] in states for row in rows)

    def stop(self) -> int:
        """End it; returns the exit status."""
        with contextlib.suppress(KeyError):
            sys.modules["ray"].shutdown()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()


def linked_checkpoint(checkpoint: Path, directory: Path) -> Path:
    """A directory of links to a checkpoint's files, to which others may be added."""
    model_dir = directory / checkpoint.name
    model_dir.mkdir()
    for file in checkpoint.iterdir():
        (model_dir / file.name).symlink_to(file.resolve())
    return model_dir


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


def vocab_size(checkpoint: Path) -> int:
    """Of the checkpoint's model."""
    return int(json.loads((checkpoint / "config.json").read_text())["vocab_size"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
