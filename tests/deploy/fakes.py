"""Workers without a model: the shape of PrefillWorker and DecodeWorker, and a fleet handle without processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from deploy.fleet_types import WorkerLost, WorkerReport, WorkerSpec
from engine_core.config import EngineConfig
from engine_core.errors import CheckpointError
from engine_core.messages import Load, PeerAddress, WorkerInfo
from engine_core.types import Numerics, Role

IDLE = Load(running=0, waiting=0, queued_tokens=0, free_pages=64, draining=False, compiles_after_warmup=0)


def worker_info(worker_id: str, incarnation: int, role: Role, port: int = 1) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=incarnation,
        role=role,
        address=PeerAddress("127.0.0.1", port, port),
        fingerprint="fake",
        numerics=Numerics.FAST,
        num_slots=4,
        num_pages=64,
        page_size=16,
        max_model_len=512,
    )


class FakeHandle:
    """One life, scripted by the test."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.started: asyncio.Future[WorkerInfo] = asyncio.get_running_loop().create_future()
        self.healthy = True
        self.silent = False
        self.progress = "loading weights 40 %"
        self.drained_with: float | None = None
        self.drain_gate = asyncio.Event()
        self.drain_gate.set()
        self.killed = False
        self.load = IDLE
        self.dead: str | None = None

        self.place_gate = asyncio.Event()
        self.place_gate.set()

    def become_ready(self) -> None:
        self.started.set_result(worker_info(self.spec.worker_id, self.spec.incarnation, self.spec.role))

    def die(self, reason: str = "killed") -> None:
        self.dead = reason
        if not self.started.done():
            self.started.set_exception(WorkerLost(reason))

    async def place(self) -> None:
        await self.place_gate.wait()

    async def start(self) -> WorkerInfo:
        return await self.started

    async def report(self) -> WorkerReport:
        if self.dead is not None:
            raise WorkerLost(self.dead)
        if self.silent:
            await asyncio.Event().wait()
        return WorkerReport(self.healthy, 4711, self.progress, self.load)

    async def drain(self, timeout_s: float) -> None:
        self.drained_with = timeout_s
        await asyncio.wait_for(self.drain_gate.wait(), timeout_s)

    async def kill(self) -> None:
        self.killed = True


class FakeWorker:
    """Takes the constructor of the real workers; `model_dir` may hold files that script its behaviour.

    `refuse`: raise CheckpointError with the file's text. `crash`: end the process. `slow`: seconds to take.
    """

    role = Role.DECODE

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        worker_id: str,
        incarnation: int,
        listen: PeerAddress,
        secret: bytes | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        if (model_dir / "refuse").exists():
            raise CheckpointError((model_dir / "refuse").read_text())
        if (model_dir / "crash").exists():
            os._exit(3)
        if (model_dir / "bug").exists():
            raise ZeroDivisionError("a bug")
        seconds = float((model_dir / "slow").read_text()) if (model_dir / "slow").exists() else 0.2
        for bucket in range(3):
            progress(f"compiling {bucket}/3 buckets")
            time.sleep(seconds / 3)
        self._id, self._incarnation, self._host = worker_id, incarnation, listen.host
        self._port, self._kv_port = listen.port, listen.kv_port
        self._server: asyncio.Server | None = None
        self._draining = False
        self.healthy = True

    async def start(self) -> WorkerInfo:
        self._server = await asyncio.start_server(lambda reader, writer: None, self._host, self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self.info()

    async def drain(self, timeout_s: float) -> None:
        self._draining = True
        await asyncio.sleep(0.05)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    def info(self) -> WorkerInfo:
        return worker_info(self._id, self._incarnation, self.role, self._port)

    def load(self) -> Load:
        return IDLE


class FakePrefillWorker(FakeWorker):
    role = Role.PREFILL


class FakeDecodeWorker(FakeWorker):
    role = Role.DECODE
