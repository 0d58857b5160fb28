"""What Ray's errors mean to the fleet: whatever ends a worker is a life lost, never an error that nobody expects."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorPlacementGroupRemoved, OutOfMemoryError, RayActorError, RayError, RayTaskError

from deploy.fleet_types import StartFailed, WorkerLost
from deploy.ray_calls import answered, started
from engine_core.errors import ConfigError


async def raising(error: Exception) -> Any:
    raise error


def of_task(cause: Exception) -> RayTaskError:
    return RayTaskError("start", "Traceback ...", cause)


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(),
        OutOfMemoryError("Task was killed due to the node running low on memory."),  # of an actor, too
        ActorPlacementGroupRemoved(),
    ],
)
async def test_a_process_that_is_gone_is_a_life_lost_whatever_ended_it(error: RayError) -> None:
    with pytest.raises(WorkerLost):
        await started(raising(error), "decode-0")
    with pytest.raises(WorkerLost):
        await answered(raising(error))


async def test_a_start_that_fails_says_why() -> None:
    with pytest.raises(ConfigError, match="no such model"):
        await started(raising(of_task(ConfigError("no such model"))), "decode-0")
    with pytest.raises(StartFailed, match="decode-0 failed to start: ValueError: bad"):
        await started(raising(of_task(ValueError("bad"))), "decode-0")


async def test_a_worker_that_cannot_answer_is_lost() -> None:
    with pytest.raises(WorkerLost, match="RuntimeError: engine"):
        await answered(raising(of_task(RuntimeError("engine"))))
