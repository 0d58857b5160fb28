"""One worker in a process of its own: the async Ray actor around PrefillWorker or DecodeWorker."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from deploy.config import NODE
from deploy.fleet_types import WorkerReport
from deploy.log import log_to_file
from engine_core.config import EngineConfig
from engine_core.messages import Load, PeerAddress, WorkerInfo
from kv_transfer.host_links import HostLinks

logger = logging.getLogger(__name__)

CONNECT_S = 120.0  # for the other hosts of a worker to start their processes
JOIN_S = 300.0  # and to open their devices
EXIT_HOST_LOST = 70


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
        follower_class: the same for hosts of a worker that are not its first.
        num_hosts: that the worker spans.
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
    follower_class: str = ""
    num_hosts: int = 1


class HostsAddress(msgspec.Struct, frozen=True):
    """Where the first host of a worker waits for the others: with commands, and as JAX's coordinator."""

    host: str
    port: int
    coordinator_port: int


class WorkerActor:
    """Answers health checks from the first moment, while the worker is built in another thread."""

    def __init__(self, plan: WorkerPlan) -> None:
        log_to_file(Path(plan.log_dir), plan.worker_id)
        self._plan = plan
        self._progress = "starting"
        self._worker: Worker | None = None
        self._ready = False
        self._hosts: HostLinks | None = None
        self._address: HostsAddress | None = None
        if plan.num_places:
            pin_process(share_of_cores(sorted(os.sched_getaffinity(0)), plan.place, plan.num_places))

    async def start(self) -> WorkerInfo:
        """Build the worker and let it listen. Whatever its constructor raises reaches the fleet."""
        build = build_worker if self._hosts is None else self._build_spanning
        self._worker = await asyncio.to_thread(build, self._plan, self._note)
        info = await self._worker.start()
        self._ready = True
        logger.info("ready: %s", info)
        return info

    async def listen(self) -> HostsAddress:
        """Before `start` of a worker over several hosts: wait for the others there."""
        plan = self._plan
        host = own_address(plan.host)
        self._hosts = HostLinks(plan.worker_id, plan.incarnation, plan.num_hosts, plan.secret, end_process)
        port = await asyncio.to_thread(self._hosts.listen, host, 0)
        self._address = HostsAddress(host, port, free_port(host))
        return self._address

    def _build_spanning(self, plan: WorkerPlan, progress: Callable[[str], None]) -> Worker:
        assert self._hosts is not None and self._address is not None
        progress("waiting for the other hosts")
        self._hosts.wait_connected(CONNECT_S)
        join_hosts(plan, self._address, 0, progress)
        return build_worker(plan, progress, hosts=self._hosts)

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


def build_worker(plan: WorkerPlan, progress: Callable[[str], None], **hosts: HostLinks) -> Worker:
    """Import jax and the role, load weights, compile buckets: slow. With `hosts`, jax has its devices already."""
    progress("importing jax")
    if not hosts:
        prepare_devices(plan)
    worker: Worker = imported(plan.worker_class)(
        plan.engine,
        model_on_node(plan, progress),
        plan.worker_id,
        plan.incarnation,
        PeerAddress(own_address(plan.host), 0, 0),
        secret=plan.secret,
        progress=progress,
        **hosts,
    )
    return worker


def prepare_devices(plan: WorkerPlan) -> None:
    """Where the devices are CPUs there is only one unless asked for before jax starts."""
    devices = plan.engine.degrees.num_devices // plan.num_hosts
    if devices > 1:
        importlib.import_module("jax").config.update("jax_num_cpu_devices", devices)


def join_hosts(plan: WorkerPlan, address: HostsAddress, number: int, progress: Callable[[str], None]) -> None:
    """Become one of the processes of a JAX program."""
    progress("joining the other hosts")
    prepare_devices(plan)
    distributed = importlib.import_module("engine_core.distributed")
    distributed.join(f"{address.host}:{address.coordinator_port}", plan.num_hosts, number, JOIN_S)


def imported(name: str) -> Any:
    """The class that `module:class` names."""
    module, _, of_class = name.partition(":")
    return getattr(importlib.import_module(module), of_class)


def model_on_node(plan: WorkerPlan, progress: Callable[[str], None]) -> Path:
    """The checkpoint's directory on this machine."""
    model = plan.engine.model
    directory: Path = importlib.import_module("deploy.checkpoint").on_node(
        plan.model_dir, model.path, model.revision, progress
    )
    return directory


def own_address(host: str) -> str:
    """Where to listen."""
    return str(importlib.import_module("ray.util").get_node_ip_address()) if host == NODE else host


def free_port(host: str) -> int:
    """One that JAX's coordinator can have; it takes none by itself."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def end_process(reason: str) -> None:
    """A host of the worker is gone, and with it this life: device calls that wait for it never return."""
    logger.critical("this process ends: %s", reason)
    os._exit(EXIT_HOST_LOST)


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
