"""Calls of Ray actors, and what their errors mean."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table

from deploy.fleet_types import StartFailed, WorkerLost
from engine_core.errors import ConfigError
from engine_core.messages import WorkerInfo

logger = logging.getLogger(__name__)

PLACE_POLL_S = 0.25


async def alive(reference: Awaitable[Any]) -> Any:
    """Await an actor call; WorkerLost where the actor is gone."""
    try:
        return await reference
    except RayTaskError:
        raise
    except RayError as error:
        raise WorkerLost(first_line(error)) from None


async def answered(reference: Awaitable[Any]) -> Any:
    """Await a worker's answer; WorkerLost where it is gone, or has none."""
    try:
        return await reference
    except RayTaskError as error:
        raise WorkerLost(f"{type(error.cause).__name__}: {error.cause}") from None
    except RayError as error:
        raise WorkerLost(first_line(error)) from None


async def started(starting: Awaitable[WorkerInfo], name: str) -> WorkerInfo:
    """Await a worker's start.

    Args:
        name: of the worker, for people.

    Raises:
        ConfigError, StartFailed: it cannot start, with the reason in one line.
        WorkerLost: its process is gone.
    """
    try:
        return await starting
    except RayTaskError as error:
        cause = error.cause
        logger.error("%s failed to start: %s", name, error)
        if isinstance(cause, ConfigError):
            raise ConfigError(str(cause)) from None
        raise StartFailed(f"{name} failed to start: {type(cause).__name__}: {cause}") from None
    except RayError as error:  # not only RayActorError: what Ray kills for memory, say, is told by another one
        raise WorkerLost(first_line(error)) from None


def first_line(error: Exception) -> str:
    """Of its text; its type's name where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def is_placed(group: PlacementGroup) -> bool:
    """Whether Ray has found nodes for all of it."""
    try:
        return bool(placement_group_table(group)["state"] == "CREATED")
    except RayError:  # the head is away for a moment
        return False
