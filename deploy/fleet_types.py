"""What the fleet says about workers: states, snapshots, and the handle through which it leads one life of a worker."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

import msgspec

from deploy.config import ServeConfig
from engine_core.messages import Load, WorkerInfo
from engine_core.types import Role
from router.fleet_view import AutoscaleView


class WorkerLost(Exception):
    """The worker's process is gone, or as good as gone."""


class StartFailed(Exception):
    """The worker's constructor raised: another try on the same machine would, too."""


class MemberState(StrEnum):
    """Where a worker is in its lives; `deploy.fleet_core` draws the transitions."""

    PENDING = "pending"  # no node has room for it yet
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    WAITING = "waiting"  # dead; the next life starts after a pause


class Successor(StrEnum):
    """Who takes the place of a worker that is told to leave."""

    NONE = "none"  # the fleet has one fewer
    SAME = "same"  # the next life of a worker of its role
    OTHER = "other"  # a worker of the other role


class WorkerSpec(msgspec.Struct, frozen=True):
    """Which life of which worker to start. `place` numbers the fleet's workers from 0 (for core pinning)."""

    worker_id: str
    role: Role
    incarnation: int
    place: int


class WorkerReport(msgspec.Struct, frozen=True):
    """A worker's answer to the health check. `progress` is what it is busy with while it starts."""

    healthy: bool
    pid: int
    progress: str = ""
    load: Load | None = None


class WorkerHandle(Protocol):
    """One life of one worker. Every method may raise `WorkerLost`."""

    async def place(self) -> None:
        """Return when some node has room for all of it; that may be never."""

    async def start(self) -> WorkerInfo:
        """Load and compile; slow. Raises ConfigError or StartFailed when another try would end alike."""

    async def report(self) -> WorkerReport:
        """Answer the health check."""

    async def drain(self, timeout_s: float) -> None:
        """Take no new work; return when the running work is done or the time is up."""

    async def kill(self) -> None:
        """End the process. Never raises, and may be called at any time."""


class MemberStatus(msgspec.Struct, frozen=True):
    """One worker as people see it in `baton status`; `becomes` says what takes its place when it has drained."""

    worker_id: str
    role: Role
    incarnation: int
    state: MemberState
    progress: str
    pid: int | None
    info: WorkerInfo | None
    load: Load | None
    becomes: Role | None = None


class Membership(msgspec.Struct, frozen=True):
    """What gateways follow: the workers that serve. `version` grows with every change."""

    version: int
    workers: tuple[WorkerInfo, ...]


class FleetStatus(msgspec.Struct, frozen=True):
    """What people follow. `fatal` is set when the fleet can never become ready; `events` are recent, oldest first;
    `num_events` counts all; `ceilings`, by role: see `FleetCore.drain`."""

    version: int
    ready: bool
    fatal: str | None
    fatal_is_config: bool
    wanted: dict[str, int]
    members: tuple[MemberStatus, ...]
    events: tuple[str, ...]
    num_events: int
    ceilings: dict[str, int] = {}
    autoscale: AutoscaleView | None = None

    @property
    def is_settled(self) -> bool:
        """Whether every wanted worker serves, and no other is left."""
        return self.ready and len(self.members) == sum(self.wanted.values())


class GatewayPlan(msgspec.Struct, frozen=True):
    """How to construct a gateway.

    Attributes:
        gateway_class: `module:class`, imported in the replica's process only.
    """

    gateway_class: str
    config: ServeConfig
    model_dir: str
    log_dir: str
    drain_timeout_s: float
    secret: bytes | None = None
