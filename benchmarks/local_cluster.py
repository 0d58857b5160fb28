"""Workers and gateways as plain processes of this machine, for measurements that need no Ray around them."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engine_core.config import EngineConfig
from engine_core.messages import PeerAddress, WorkerInfo
from engine_core.types import Role
from router.config import GatewayConfig

START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker to start.

    Attributes:
        cores: that its threads may use; empty: all.
        num_pages: of its cache; 0: as the engine's config says.
    """

    role: Role
    name: str
    cores: tuple[int, ...] = ()
    num_pages: int = 0


class LocalCluster:
    """Worker processes and one gateway process in front of them; stops what it started.

    Args:
        config: of every engine.
        model_dir: the checkpoint.
        workers: decode workers alone make a colocated cluster.
        gateway_cores: cores of the gateway; empty: all.
    """

    def __init__(
        self, config: EngineConfig, model_dir: Path, workers: Sequence[WorkerSpec], gateway_cores: tuple[int, ...] = ()
    ) -> None:
        colocated = all(worker.role is Role.DECODE for worker in workers)
        started = [_Child(_run_worker, config, model_dir, worker) for worker in workers]
        self._children = started
        self.infos: list[WorkerInfo] = [child.result() for child in started]
        gateway = GatewayConfig(
            model_name="bench",
            port=0,
            colocated=colocated,
            local_prefill_tokens=0,
            compile_cache=config.compile_cache,
        )
        child = _Child(_run_gateway, gateway, model_dir, self.infos, gateway_cores)
        self._children = [*started, child]
        self.port: int = child.result()

    def stop(self) -> None:
        """End every process."""
        for child in reversed(self._children):
            child.stop()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Child:
    """A process that reports one object when it is up, and ends when its pipe does."""

    def __init__(self, target: Any, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    def result(self) -> Any:
        """What it reported."""
        if not self._pipe.poll(START_TIMEOUT_S):
            raise TimeoutError("a process of the benchmark did not come up")
        return self._pipe.recv()

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()


def _run_worker(pipe: Connection, config: EngineConfig, model_dir: Path, spec: WorkerSpec) -> None:
    if spec.cores:
        os.sched_setaffinity(0, spec.cores)  # before jax sizes its thread pools
    from decode_worker.worker import DecodeWorker  # noqa: PLC0415  behind the line above
    from prefill_worker.worker import PrefillWorker  # noqa: PLC0415

    if spec.num_pages:
        config = replace(config, cache=replace(config.cache, num_pages=spec.num_pages))
    kind = PrefillWorker if spec.role is Role.PREFILL else DecodeWorker
    worker = kind(config, model_dir, spec.name, 1, PeerAddress("127.0.0.1", 0, 0))

    async def serve() -> None:
        pipe.send(await worker.start())
        await _until_closed(pipe)
        await worker.stop()

    _run(serve())


def _run_gateway(
    pipe: Connection, config: GatewayConfig, model_dir: Path, infos: list[WorkerInfo], cores: tuple[int, ...]
) -> None:
    if cores:
        os.sched_setaffinity(0, cores)
    from router.server import Gateway  # noqa: PLC0415  this process alone needs it

    async def serve() -> None:
        gateway = Gateway(config, model_dir)
        await gateway.start()
        gateway.follow(infos)
        pipe.send(gateway.port)
        await _until_closed(pipe)
        await gateway.drain(1.0)

    _run(serve())


def _run(main: Any) -> None:
    import uvloop  # noqa: PLC0415  children only

    uvloop.run(main)


async def _until_closed(pipe: Connection) -> None:
    def wait() -> None:
        try:
            pipe.recv()
        except EOFError:
            return

    await asyncio.get_running_loop().run_in_executor(None, wait)
