"""One life of a worker over several hosts: an actor on each, in one placement group that comes and goes as a whole."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray.util.tpu import SlicePlacementGroup

from deploy.config import WorkerShape
from deploy.fleet_types import WorkerLost, WorkerReport
from deploy.follower_actor import FollowerActor
from deploy.ray_calls import PLACE_POLL_S, answered, first_line, is_placed, started
from deploy.worker_actor import WorkerActor, WorkerPlan
from engine_core.errors import ConfigError
from engine_core.messages import WorkerInfo

logger = logging.getLogger(__name__)

TPU_WORKER_ID = "ray.io/tpu-worker-id"  # a node's place in its slice
CPU_SHARE = 0.001  # a bundle must reserve something
SLICE_S = 30.0  # for one attempt at a slice


class SpanningWorkerHandle:
    """See `WorkerHandle`. The death of any actor is the worker's.

    With TPUs the group is a whole slice (`ray.util.tpu`), which its topology names: pools of one topology share their
    slices, so none takes a pool's resource. Else hosts are packed onto few machines.
    """

    def __init__(self, plan: WorkerPlan, shape: WorkerShape) -> None:
        self._plan = plan
        self._shape = shape
        self._slice: SlicePlacementGroup | None = None
        self._group: PlacementGroup | None = None
        self._leader: Any = None
        self._followers: list[Any] = []
        self._following: list[Any] = []
        self._refusal: ConfigError | None = None
        self._is_over = False
        if not shape.tpus:
            self._group = placement_group([self._bundle()] * shape.hosts, strategy="PACK", name=self._name)

    @property
    def _name(self) -> str:
        return f"baton-{self._plan.worker_id}.{self._plan.incarnation}"

    async def place(self) -> None:
        """Return when Ray has found all nodes, or can never."""
        while self._shape.tpus and self._slice is None:
            try:
                await asyncio.to_thread(self._reserve_slice)
            except ValueError as error:
                self._refusal = ConfigError(f"fleet.topology {self._shape.topology}: {error}")
                return
            except (RuntimeError, TimeoutError, RayError) as error:
                logger.info("no slice for %s yet: %s", self._name, first_line(error))
                await asyncio.sleep(PLACE_POLL_S)
        if self._slice is not None:
            self._group = self._slice.placement_group
        assert self._group is not None
        while not await asyncio.to_thread(is_placed, self._group):  # noqa: ASYNC110
            await asyncio.sleep(PLACE_POLL_S)

    async def start(self) -> WorkerInfo:
        """Load and compile on all hosts. Raises ConfigError or StartFailed with the reason in one line."""
        if self._refusal is not None:
            raise self._refusal
        assert self._group is not None
        bundles = await asyncio.to_thread(_bundles_in_order, self._group, self._shape.hosts)
        self._leader = self._actor(WorkerActor, bundles[0]).remote(self._plan)
        self._followers = [
            self._actor(FollowerActor, bundle).remote(self._plan, number)
            for number, bundle in enumerate(bundles[1:], start=1)
        ]
        return await started(self._start_together(), self._name)

    async def _start_together(self) -> WorkerInfo:
        address = await self._leader.listen.remote()
        # What a follower raises here its leader hears from it, and raises too.
        self._following = [follower.follow.remote(address) for follower in self._followers]
        info: WorkerInfo = await self._leader.start.remote()
        return info

    async def report(self) -> WorkerReport:
        """Answer the health check: the first host's answer, where all are well."""
        if self._leader is None:
            return WorkerReport(True, 0, "starting")
        calls = [answered(actor.report.remote()) for actor in (self._leader, *self._followers)]
        reports: list[WorkerReport] = await asyncio.gather(*calls)
        sick = [number for number, report in enumerate(reports) if not report.healthy]
        if sick:
            raise WorkerLost(f"hosts {sick} of it are not well")
        return reports[0]

    async def drain(self, timeout_s: float) -> None:
        """Finish what runs, then close."""
        await answered(self._leader.drain.remote(timeout_s))

    async def kill(self) -> None:
        """End all processes, and give back what they took."""
        self._is_over = True
        for actor in (self._leader, *self._followers):
            if actor is not None:
                ray.kill(actor)
        if self._slice is not None:
            self._slice.shutdown()
        elif self._group is not None:
            remove_placement_group(self._group)

    def _reserve_slice(self) -> None:
        """In a thread, which goes on when nobody waits for it any more."""
        shape = self._shape
        self._slice = SlicePlacementGroup(
            shape.topology,
            shape.accelerator,
            self._bundle(),
            strategy="STRICT_SPREAD",
            name=self._name,
            chips_per_vm=int(shape.tpus) // shape.hosts,
            head_reservation_timeout_s=SLICE_S,
        )
        if self._is_over:
            self._slice.shutdown()

    def _bundle(self) -> dict[str, float]:
        """What one host takes."""
        shape = self._shape
        if shape.tpus:
            return {"CPU": 0, "TPU": shape.tpus / shape.hosts}
        bundle = {"GPU": shape.gpus / shape.hosts} if shape.gpus else {}
        bundle |= {shape.pool: 1.0} if shape.pool else {}
        return bundle or {"CPU": CPU_SHARE}

    def _actor(self, kind: type, bundle: int) -> Any:
        taken = self._bundle()
        resources = {name: count for name, count in taken.items() if name not in ("CPU", "GPU")}
        return ray.remote(kind).options(
            num_cpus=0,
            num_gpus=taken.get("GPU", 0),
            resources=resources,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
        )


def _bundles_in_order(group: PlacementGroup, num_hosts: int) -> list[int]:
    """Bundles by their nodes' place in the TPU slice, so that hosts are numbered as JAX numbers them."""
    labels: dict[str, dict[str, str]] = {node["NodeID"]: node.get("Labels") or {} for node in ray.nodes()}
    nodes = placement_group_table(group)["bundles_to_node_id"]
    places = [labels.get(nodes[bundle], {}).get(TPU_WORKER_ID, str(bundle)) for bundle in range(num_hosts)]
    return sorted(range(num_hosts), key=lambda bundle: int(places[bundle]))
