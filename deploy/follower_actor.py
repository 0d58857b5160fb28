"""A host of a worker that is not its first, in a process of its own: an async Ray actor, as WorkerActor is."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Protocol

from deploy.fleet_types import WorkerReport
from deploy.log import log_to_file
from deploy.worker_actor import (
    CONNECT_S,
    HostsAddress,
    WorkerPlan,
    end_process,
    imported,
    join_hosts,
    model_on_node,
    own_address,
)
from kv_transfer.leader_link import LeaderLink

logger = logging.getLogger(__name__)


class Follower(Protocol):
    """What PrefillFollower and DecodeFollower share."""

    healthy: bool

    async def start(self) -> None:
        """Begin to follow."""


class FollowerActor:
    """Answers health checks from the first moment.

    Args:
        plan: of the worker.
        number: of this host, from 1.
    """

    def __init__(self, plan: WorkerPlan, number: int) -> None:
        self._name = f"{plan.worker_id}.host-{number}"
        log_to_file(Path(plan.log_dir), self._name)
        self._plan = plan
        self._number = number
        self._follower: Follower | None = None

    async def follow(self, address: HostsAddress) -> None:
        """Join the first host, and do from then on what it does."""
        self._follower = await asyncio.to_thread(self._build, address)
        await self._follower.start()
        logger.info("%s follows", self._name)

    async def report(self) -> WorkerReport:
        """Answer the health check."""
        return WorkerReport(self._follower is None or self._follower.healthy, os.getpid())

    def _build(self, address: HostsAddress) -> Follower:
        plan = self._plan
        link = LeaderLink(plan.worker_id, plan.incarnation, self._number, plan.secret, end_process)
        link.connect(address.host, address.port, CONNECT_S)
        join_hosts(plan, address, self._number, self._note)
        model_dir = model_on_node(plan, self._note)
        follower: Follower = imported(plan.follower_class)(
            plan.engine, model_dir, own_address(plan.host), link, self._note
        )
        return follower

    def _note(self, progress: str) -> None:
        logger.info("%s", progress)
