"""One worker in a process of its own: the async Ray actor around PrefillWorker or DecodeWorker."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from deploy.config import NODE
from deploy.fleet_types import WorkerReport
from deploy.log import log_to_file
from engine_core.config import EngineConfig
from engine_core.messages import Load, PeerAddress, WorkerInfo

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """What PrefillWorker and DecodeWorker share."""

    healthy: bool

    async def start(self) -> WorkerInfo:
        """Listen, start the engine thread."""

    async def drain(self, timeout_s: float) -> None:
        """No new work; finish what runs."""

    async def stop(self) -> None:
        """Close everything."""

    def load(self) -> Load:
        """How busy it is."""


class WorkerPlan(msgspec.Struct, frozen=True):
    """How to construct a worker.

    Attributes:
        worker_class: `module:class`, imported in the worker's process only.
        place: number of this worker in the fleet, from 0.
        num_places: workers among which the cores are shared; 0 leaves the process unpinned.
    """

    worker_class: str
    engine: EngineConfig
    model_dir: str
    worker_id: str
    incarnation: int
    host: str
    log_dir: str
    secret: bytes | None
    place: int
    num_places: int


class WorkerActor:
    """Answers health checks from the first moment, while the worker is built in another thread."""

    def __init__(self, plan: WorkerPlan) -> None:
        log_to_file(Path(plan.log_dir), plan.worker_id)
        self._plan = plan
        self._progress = "starting"
        self._worker: Worker | None = None
        self._ready = False
        if plan.num_places:
            pin_process(share_of_cores(sorted(os.sched_getaffinity(0)), plan.place, plan.num_places))

    async def start(self) -> WorkerInfo:
        """Build the worker and let it listen. Whatever its constructor raises reaches the fleet."""
        self._worker = await asyncio.to_thread(build_worker, self._plan, self._note)
        info = await self._worker.start()
        self._ready = True
        logger.info("ready: %s", info)
        return info

    async def report(self) -> WorkerReport:
        """Answer the health check."""
        if not self._ready or self._worker is None:
            return WorkerReport(True, os.getpid(), self._progress)
        return WorkerReport(self._worker.healthy, os.getpid(), "", self._worker.load())

    async def drain(self, timeout_s: float) -> None:
        """Finish what runs, then close."""
        if self._worker is not None and self._ready:
            await self._worker.drain(timeout_s)
            await self._worker.stop()

    def _note(self, progress: str) -> None:
        self._progress = progress
        logger.info("%s", progress)


def build_worker(plan: WorkerPlan, progress: Callable[[str], None]) -> Worker:
    """Import jax and the role, load weights, compile buckets: slow."""
    progress("importing jax")
    devices = plan.engine.degrees.num_devices
    if devices > 1:  # where the devices are CPUs there is only one unless asked for before jax starts
        importlib.import_module("jax").config.update("jax_num_cpu_devices", devices)
    module, _, name = plan.worker_class.partition(":")
    worker_class = getattr(importlib.import_module(module), name)
    host = plan.host
    if host == NODE:
        host = str(importlib.import_module("ray.util").get_node_ip_address())
    model = plan.engine.model
    worker: Worker = worker_class(
        plan.engine,
        importlib.import_module("deploy.checkpoint").on_node(plan.model_dir, model.path, model.revision, progress),
        plan.worker_id,
        plan.incarnation,
        PeerAddress(host, 0, 0),
        secret=plan.secret,
        progress=progress,
    )
    return worker


def share_of_cores(cores: list[int], place: int, num_places: int) -> set[int]:
    """Split `cores` evenly; with more workers than cores they take turns."""
    each = len(cores) // num_places
    if each == 0:
        return {cores[place % len(cores)]}
    first = (place % num_places) * each
    return set(cores[first : first + each])


def pin_process(cores: set[int]) -> None:
    """Keep every thread of this process, and those it will start, on `cores`; XLA sizes its pools accordingly."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread), cores)
