"""The fleet as a Ray actor: `FleetCore` with worker actors as its processes, and how others reach it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deploy.autoscale import Autoscaler
from deploy.config import AutoscaleMode, ServeConfig, WorkerShape
from deploy.fleet_core import FleetCore
from deploy.fleet_types import FleetStatus, Membership, Successor, WorkerHandle, WorkerReport, WorkerSpec
from deploy.log import log_to_file
from deploy.ray_calls import PLACE_POLL_S, alive, answered, is_placed, started
from deploy.spanning_worker import SpanningWorkerHandle
from deploy.worker_actor import WorkerActor, WorkerPlan
from engine_core.errors import ConfigError
from engine_core.messages import WorkerInfo
from engine_core.types import Role
from router.load_meter import LoadTotals

FLEET = "baton-fleet"
NAMESPACE = "baton"
FOLLOWER_CLASSES = {
    Role.PREFILL: "prefill_worker.follower:PrefillFollower",
    Role.DECODE: "decode_worker.follower:DecodeFollower",
}


class FleetPlan(msgspec.Struct, frozen=True):
    """What the fleet actor is told when it is made."""

    config: ServeConfig
    model_dir: str
    log_dir: str
    worker_classes: dict[Role, str]
    secret: bytes | None = None


class RayWorkerHandle:
    """One life of a worker as a Ray actor; see `WorkerHandle`.

    What it takes is reserved as one placement group, all of it or nothing: where no node has room for the group, Ray's
    autoscaler starts one that has, and the group's end leaves that node to it.
    """

    def __init__(self, plan: WorkerPlan, shape: WorkerShape) -> None:
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
        if shape.gpus:
            options["num_gpus"] = shape.gpus
        resources = worker_resources(shape)
        if resources:
            options["resources"] = resources
        bundle = {"GPU": shape.gpus} if shape.gpus else {}
        bundle |= resources
        self._group: PlacementGroup | None = None
        if bundle:
            name = f"{plan.worker_id}.{plan.incarnation}"
            self._group = placement_group([bundle], strategy="STRICT_PACK", name=f"baton-{name}")
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group)
        self._worker_id = plan.worker_id
        self._actor = ray.remote(WorkerActor).options(**options).remote(plan)

    async def place(self) -> None:
        """Return when Ray has found a node."""
        while self._group is not None and not await asyncio.to_thread(is_placed, self._group):  # noqa: ASYNC110
            await asyncio.sleep(PLACE_POLL_S)

    async def start(self) -> WorkerInfo:
        """Load and compile. Raises ConfigError or StartFailed with the reason in one line."""
        return await started(self._actor.start.remote(), self._worker_id)

    async def report(self) -> WorkerReport:
        """Answer the health check."""
        report: WorkerReport = await answered(self._actor.report.remote())
        return report

    async def drain(self, timeout_s: float) -> None:
        """Finish what runs, then close."""
        await answered(self._actor.drain.remote(timeout_s))

    async def kill(self) -> None:
        """End the process, and give back what it took."""
        ray.kill(self._actor)
        if self._group is not None:
            remove_placement_group(self._group)


def worker_resources(shape: WorkerShape) -> dict[str, float]:
    """What a worker of one host takes of Ray's custom resources."""
    resources = {"TPU": shape.tpus} if shape.tpus else {}
    if shape.pool:
        resources[shape.pool] = 1
    return resources


class FleetActor:
    """Thin: every method is FleetCore's."""

    def __init__(self, plan: FleetPlan) -> None:
        log_to_file(Path(plan.log_dir), "fleet")
        self._plan = plan
        self._core = FleetCore(plan.config.fleet, self._launch)
        off = plan.config.autoscale.mode is AutoscaleMode.OFF
        self._autoscaler = None if off else Autoscaler(plan.config, self._core)

    def _launch(self, spec: WorkerSpec) -> WorkerHandle:
        config = self._plan.config
        shape = config.shape(spec.role)
        num_places = sum(config.fleet.count(role) for role in Role) if config.fleet.pin_cores else 0
        plan = WorkerPlan(
            worker_class=self._plan.worker_classes[spec.role],
            engine=shape.engine,
            model_dir=self._plan.model_dir,
            worker_id=spec.worker_id,
            incarnation=spec.incarnation,
            host=config.fleet.host,
            log_dir=self._plan.log_dir,
            secret=self._plan.secret,
            place=spec.place,
            num_places=num_places,
            follower_class=FOLLOWER_CLASSES[spec.role],
            num_hosts=shape.hosts,
        )
        return RayWorkerHandle(plan, shape) if shape.hosts == 1 else SpanningWorkerHandle(plan, shape)

    async def start(self) -> int:
        """Start every worker in the background; returns this process's id."""
        await self._core.start()
        if self._autoscaler is not None:
            self._autoscaler.start()
        return os.getpid()

    async def heard(self, gateway: str, totals: LoadTotals) -> None:
        """A gateway told its load."""
        if self._autoscaler is not None:
            self._autoscaler.heard(gateway, totals)

    async def scale(self, wanted: dict[Role, int]) -> FleetStatus:
        """See FleetCore."""
        return await self._core.scale(wanted)

    async def drain(self, worker_id: str, successor: Successor) -> FleetStatus:
        """See FleetCore."""
        return await self._core.drain(worker_id, successor)

    async def stop(self, drain_timeout_s: float) -> None:
        """See FleetCore."""
        if self._autoscaler is not None:
            self._autoscaler.stop()
        await self._core.stop(drain_timeout_s)

    async def wait_for_change(self, version: int, timeout_s: float) -> Membership:
        """See FleetCore."""
        return await self._core.wait_for_change(version, timeout_s)

    async def watch(self, version: int, timeout_s: float) -> FleetStatus:
        """See FleetCore."""
        return self._with_autoscaler(await self._core.watch(version, timeout_s))

    async def status(self) -> FleetStatus:
        """See FleetCore."""
        return self._with_autoscaler(self._core.status())

    def _with_autoscaler(self, status: FleetStatus) -> FleetStatus:
        if self._autoscaler is None:
            return status
        return msgspec.structs.replace(status, autoscale=self._autoscaler.view())


class FleetClient:
    """The fleet, from any process that is connected to its Ray cluster."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def create(cls, plan: FleetPlan) -> FleetClient:
        """Make the fleet actor. It lives until it is killed, or the process that made it ends."""
        options: dict[str, Any] = {"name": FLEET, "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": 1000}
        return cls(ray.remote(FleetActor).options(**options).remote(plan))

    @classmethod
    def find(cls) -> FleetClient:
        """Find the cluster's fleet; ValueError where there is none."""
        return cls(ray.get_actor(FLEET, namespace=NAMESPACE))

    async def start(self) -> int:
        """See FleetActor."""
        pid: int = await alive(self._actor.start.remote())
        return pid

    async def scale(self, wanted: dict[Role, int]) -> FleetStatus:
        """See FleetCore."""
        return await _accepted(self._actor.scale.remote(wanted))

    async def drain(self, worker_id: str, successor: Successor) -> FleetStatus:
        """See FleetCore."""
        return await _accepted(self._actor.drain.remote(worker_id, successor))

    async def heard(self, gateway: str, totals: LoadTotals) -> None:
        """See FleetActor."""
        await alive(self._actor.heard.remote(gateway, totals))

    async def stop(self, drain_timeout_s: float) -> None:
        """See FleetCore."""
        await alive(self._actor.stop.remote(drain_timeout_s))

    async def wait_for_change(self, version: int, timeout_s: float) -> Membership:
        """See FleetCore."""
        membership: Membership = await alive(self._actor.wait_for_change.remote(version, timeout_s))
        return membership

    async def watch(self, version: int, timeout_s: float) -> FleetStatus:
        """See FleetCore."""
        status: FleetStatus = await alive(self._actor.watch.remote(version, timeout_s))
        return status

    async def status(self) -> FleetStatus:
        """See FleetCore."""
        status: FleetStatus = await alive(self._actor.status.remote())
        return status


async def _accepted(call: Any) -> FleetStatus:
    """The fleet's answer to an order. Raises ConfigError where it refuses."""
    try:
        status: FleetStatus = await alive(call)
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise ConfigError(str(error.cause)) from None
        raise
    return status
