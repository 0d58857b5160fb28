"""`baton status` and `baton scale`: talk to the fleet of a Baton that runs, over its Ray cluster."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import sys
import time
from typing import Any

import msgspec
import ray

from deploy.fleet import NAMESPACE, FleetClient
from deploy.fleet_types import FleetStatus, MemberState, MemberStatus, WorkerLost
from deploy.progress import Progress
from deploy.run_file import RunFile
from engine_core.errors import ConfigError
from engine_core.types import Role
from router.fleet_view import AutoscaleView

WATCH_S = 5.0
SHOWN_DECISIONS = 3


def status(run: RunFile, as_json: bool) -> int:
    """Print what the fleet says; exit status 0 where every wanted worker serves, else 1."""
    answer: FleetStatus = _on_cluster(run, FleetClient.status)
    if as_json:
        described = {"url": run.url, "model": run.model, **msgspec.to_builtins(answer)}
        sys.stdout.write(msgspec.json.encode(described).decode() + "\n")
    else:
        sys.stdout.write(describe(run, answer))
    return 0 if answer.ready else 1


def scale(run: RunFile, wanted: dict[Role, int], wait: bool, timeout_s: float) -> int:
    """Ask for other numbers of workers and, if told so, wait until they serve; exit status 0 when they do."""

    async def work(fleet: FleetClient) -> FleetStatus:
        answer = await fleet.scale(wanted)
        if wait:
            async with asyncio.timeout(timeout_s):
                answer = await _settled(fleet, answer)
        return answer

    try:
        answer: FleetStatus = _on_cluster(run, work)
    except TimeoutError:
        sys.stderr.write(f"Not ready after {timeout_s:g} s; `baton status` tells more.\n")
        return 1
    sys.stdout.write(describe(run, answer))
    return 0


async def _settled(fleet: FleetClient, answer: FleetStatus) -> FleetStatus:
    """Wait until every wanted worker serves and every surplus one is gone."""
    progress = Progress()
    progress.starting(answer)
    while not answer.ready or len(answer.members) != sum(answer.wanted.values()):
        answer = await fleet.watch(answer.version, WATCH_S)
        progress.starting(answer)
    return answer


def _on_cluster(run: RunFile, work: Any) -> Any:
    """Connect to Ray, run `work(fleet)`, disconnect. `ray_local.prepare` has set the environment."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Ray's threads print other processes' troubles
            ray.init(address=run.ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            return asyncio.run(work(FleetClient.find()))
    except (ConnectionError, ValueError, WorkerLost) as error:
        raise ConfigError(f"the Baton at {run.url} does not answer: {error}") from None
    finally:
        ray.shutdown()


def describe(run: RunFile, answer: FleetStatus) -> str:
    """A table for people."""
    wanted = ", ".join(f"{count} {role}" for role, count in answer.wanted.items())
    lines = [f"{run.url}  model {run.model}  {'ready' if answer.ready else 'not ready'}  (wanted: {wanted})"]
    rows: list[tuple[str, ...]] = [("WORKER", "STATE", "LIFE", "PID", "RUNNING", "WAITING", "FREE PAGES", "ADDRESS")]
    rows += [_row(member) for member in answer.members]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if answer.autoscale is not None:
        lines += _autoscale(answer.autoscale)
    return "\n".join(lines) + "\n"


def _autoscale(view: AutoscaleView) -> list[str]:
    """What the autoscaler wants, and its last decisions with their reasons, the latest first."""
    target = ", ".join(f"{count} {role}" for role, count in view.target.items())
    wants = view.waits_for or f"wants {target}"
    lines = [f"autoscale: {view.mode}, {wants}"]
    for decision in reversed(view.decisions[-SHOWN_DECISIONS:]):
        at = time.strftime("%H:%M:%S", time.localtime(decision.at))
        lines += [f"  {at}  {decision.text}", *(f"            {reason}" for reason in decision.reasons)]
    return lines


def _row(member: MemberStatus) -> tuple[str, ...]:
    load, info = member.load, member.info
    state = member.state.value
    if member.progress and member.state is MemberState.STARTING:
        state += f" ({member.progress})"
    return (
        member.worker_id,
        state,
        str(member.incarnation),
        "-" if member.pid is None else str(member.pid),
        "-" if load is None else str(load.running),
        "-" if load is None else str(load.waiting),
        "-" if load is None or info is None else f"{load.free_pages}/{info.num_pages}",
        "-" if info is None else f"{info.address.host}:{info.address.port}",
    )
