"""The gateway as a Ray Serve deployment. Serve owns each replica's life; the replica listens for HTTP itself.

Serve's own HTTP path costs 5 to 9 ms per request (DESIGN.md), so no Serve proxy is started: a replica runs its own
server, which shares the port with the other replicas of the machine (SO_REUSEPORT).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from deploy.checkpoint import on_node
from deploy.config import AutoscaleMode, FleetConfig
from deploy.fleet import FleetClient
from deploy.fleet_types import FleetStatus, GatewayPlan, Membership, WorkerLost
from deploy.gateway_scaling import DOWNSCALE_DELAY_S, LOOK_BACK_S, STREAMS, UPSCALE_DELAY_S, StreamsPolicy
from deploy.log import log_to_file
from engine_core.messages import WorkerInfo
from router.fleet_view import FleetView, MemberView
from router.load_meter import LoadTotals

logger = logging.getLogger(__name__)

APP = "baton"
POLL_S = 30.0
RETRY_S = 1.0
FIND_S = 2.0
TOLD_PER_WINDOW = 5
ANY = -1  # no fleet's version: the next answer comes at once
QUIET = {"log_level": "WARNING", "enable_access_log": False}


class Gateway(Protocol):
    """A gateway: constructed from a GatewayConfig, a model directory and the secret; see `router.server`."""

    async def start(self, workers: Sequence[WorkerInfo] = ()) -> None:
        """Connect to these workers, then listen."""

    def follow(self, workers: Sequence[WorkerInfo]) -> None:
        """These workers serve, and no others."""

    def describe_fleet(self, fleet: FleetView) -> None:
        """What people want to see of the fleet."""

    @property
    def num_streams(self) -> int:
        """Choices in progress."""

    def measure(self) -> LoadTotals:
        """What the autoscaler wants to know."""

    def check_health(self) -> None:
        """Raise when it no longer listens."""

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, finish the running ones, close."""


class FleetFollower(Protocol):
    """The part of the fleet that a gateway uses."""

    async def wait_for_change(self, version: int, timeout_s: float) -> Membership:
        """See FleetCore."""

    async def watch(self, version: int, timeout_s: float) -> FleetStatus:
        """See FleetCore."""

    async def heard(self, gateway: str, totals: LoadTotals) -> None:
        """See FleetActor."""


async def first_members(fleet: FleetFollower, timeout_s: float) -> tuple[WorkerInfo, ...]:
    """Who serves already; none where no fleet answers within the time."""
    with contextlib.suppress(WorkerLost, TimeoutError):
        async with asyncio.timeout(timeout_s):
            return (await fleet.wait_for_change(ANY, timeout_s)).workers
    return ()


async def follow_fleet(fleet: FleetFollower, gateway: Gateway, retry_s: float) -> None:
    """Keep the gateway's view equal to the fleet's, for ever. Without a fleet the last view stands."""
    version = 0
    while True:
        try:
            membership = await fleet.wait_for_change(version, POLL_S)
        except WorkerLost as error:
            logger.warning("the fleet does not answer: %s", error)
            version = ANY  # it may be another fleet that answers next, which counts anew
            await asyncio.sleep(retry_s)
            continue
        if membership.version != version:
            version = membership.version
            logger.info("membership %d: %s", version, [(w.worker_id, w.incarnation) for w in membership.workers])
            gateway.follow(membership.workers)


async def follow_status(fleet: FleetFollower, gateway: Gateway, retry_s: float) -> None:
    """Keep what the gateway's dashboard shows equal to what the fleet says, for ever."""
    version = 0
    while True:
        try:
            status = await fleet.watch(version, POLL_S)
        except WorkerLost:  # `follow_fleet` tells
            version = ANY
            await asyncio.sleep(retry_s)
            continue
        version = status.version
        gateway.describe_fleet(view(status))


async def tell_load(fleet: FleetFollower, gateway: Gateway, name: str, interval_s: float) -> None:
    """Let the autoscaler know this gateway's load, for ever."""
    while True:
        await asyncio.sleep(interval_s)
        with contextlib.suppress(WorkerLost):  # `follow_fleet` tells
            await fleet.heard(name, gateway.measure())


def view(status: FleetStatus) -> FleetView:
    """What of it people want to see."""
    members = tuple(
        MemberView(m.worker_id, str(m.role), m.incarnation, m.state.value, m.progress, m.pid) for m in status.members
    )
    return FleetView(status.wanted, members, status.events, status.autoscale)


class NamedFleet:
    """The cluster's fleet, whichever has its name: it is looked up again after a loss. See FleetFollower."""

    def __init__(self) -> None:
        self._client: FleetClient | None = None

    async def wait_for_change(self, version: int, timeout_s: float) -> Membership:
        """See FleetCore."""
        client = await self._find()
        with self._forgetting_the_lost():
            return await client.wait_for_change(version, timeout_s)

    async def watch(self, version: int, timeout_s: float) -> FleetStatus:
        """See FleetCore."""
        client = await self._find()
        with self._forgetting_the_lost():
            return await client.watch(version, timeout_s)

    async def heard(self, gateway: str, totals: LoadTotals) -> None:
        """See FleetActor."""
        client = await self._find()
        with self._forgetting_the_lost():
            await client.heard(gateway, totals)

    async def _find(self) -> FleetClient:
        if self._client is None:
            try:
                self._client = await asyncio.to_thread(FleetClient.find)
            except ValueError:
                raise WorkerLost("there is none yet") from None
        return self._client

    @contextlib.contextmanager
    def _forgetting_the_lost(self) -> Iterator[None]:
        try:
            yield
        except WorkerLost:
            self._client = None
            raise


class GatewayReplica:
    """What Serve runs.

    Args:
        keeper: of the fleet, where it belongs to the same application; it is only kept alive by being named.
    """

    async def __init__(self, plan: GatewayPlan, keeper: DeploymentHandle[Any] | None) -> None:  # type: ignore[misc]  # Serve awaits it
        log_to_file(Path(plan.log_dir), "gateway")
        module, _, name = plan.gateway_class.partition(":")
        self._plan = plan
        gateway_class = getattr(importlib.import_module(module), name)
        model = plan.config.engine.model
        model_dir = on_node(plan.model_dir, model.path, model.revision, lambda text: logger.info("%s", text))
        self._gateway: Gateway = gateway_class(plan.config.gateway, model_dir, plan.secret)
        fleet = NamedFleet()
        await self._gateway.start(await first_members(fleet, FIND_S))
        self._following = asyncio.create_task(follow_fleet(fleet, self._gateway, RETRY_S))
        self._others = [asyncio.create_task(follow_status(fleet, self._gateway, RETRY_S))]
        scaling = plan.config.autoscale
        if scaling.mode is not AutoscaleMode.OFF:
            name = f"{socket.gethostname()}-{os.getpid()}"
            telling = tell_load(fleet, self._gateway, name, scaling.window_s / TOLD_PER_WINDOW)
            self._others.append(asyncio.create_task(telling))
        logger.info("listening; event loop %s", type(asyncio.get_running_loop()))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for `StreamsPolicy`."""
        return {STREAMS: float(self._gateway.num_streams)}

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if self._following.done():
            self._following.result()
        self._gateway.check_health()

    async def __del__(self) -> None:
        """Called by Serve when the replica shall go."""
        await self._gateway.drain(self._plan.drain_timeout_s)
        for task in (self._following, *self._others):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def gateway_app(plan: GatewayPlan, keeper: Application | None) -> Application:
    """The gateways as a Serve application, and `keeper` as a part of it."""
    fleet = plan.config.fleet
    resources = {"resources": {"baton-gateway": 1}} if fleet.pool_resources else {}
    number: dict[str, Any] = {"num_replicas": fleet.gateways}
    if fleet.max_gateways > fleet.gateways:
        number = {"autoscaling_config": _scaling(fleet)}
    deployment = serve.deployment(
        name="gateway",
        **number,
        ray_actor_options={"num_cpus": 0, **resources},
        graceful_shutdown_timeout_s=plan.drain_timeout_s + 5,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,
        health_check_period_s=2,
        health_check_timeout_s=10,
        logging_config=QUIET,
    )(GatewayReplica)
    return deployment.bind(plan, keeper)


def _scaling(fleet: FleetConfig) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=fleet.gateways,
        max_replicas=fleet.max_gateways,
        upscale_delay_s=UPSCALE_DELAY_S,
        downscale_delay_s=DOWNSCALE_DELAY_S,
        look_back_period_s=LOOK_BACK_S,
        policy=AutoscalingPolicy(
            policy_function=StreamsPolicy, policy_kwargs={"streams_per_gateway": fleet.streams_per_gateway}
        ),
    )


def start_gateways(plan: GatewayPlan) -> None:
    """Start Serve and the gateways; returns when they listen."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    try:
        serve.run(gateway_app(plan, None), name=APP, route_prefix=None)
    except RuntimeError as error:  # it says that, not why
        deployed = serve.status().applications[APP].deployments
        raise RuntimeError("\n".join([str(error), *(state.message for state in deployed.values())])) from None


def stop_gateways() -> None:
    """Let running requests finish, then end every replica."""
    serve.delete(APP)
