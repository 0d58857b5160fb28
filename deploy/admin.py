"""`baton status`, `scale` and `drain`: talk to the fleet of a Baton that runs, over its Ray cluster."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import ray

from deploy.fleet import NAMESPACE, FleetClient
from deploy.fleet_types import FleetStatus, MemberState, MemberStatus, Successor, WorkerLost
from deploy.progress import Progress
from deploy.ray_calls import first_line
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
        return await _settled(fleet, answer) if wait else answer

    return _ordered(run, work, timeout_s)


def drain(run: RunFile, worker_id: str, successor: Successor, wait: bool, timeout_s: float) -> int:
    """Let a worker leave and, if told so, wait until it is gone and its successor serves; exit status 0 then."""

    async def work(fleet: FleetClient) -> FleetStatus:
        answer = await fleet.drain(worker_id, successor)
        if not wait:
            return answer
        life = next((member.incarnation for member in answer.members if member.worker_id == worker_id), 0)
        answer = await _watched(fleet, answer, lambda status: _is_gone(status, worker_id, life))
        return answer if successor is Successor.NONE else await _settled(fleet, answer)

    return _ordered(run, work, timeout_s)


def _ordered(run: RunFile, work: Callable[[FleetClient], Awaitable[FleetStatus]], timeout_s: float) -> int:
    """Give an order, wait for what it wants to wait for, and print what the fleet is then."""

    async def within(fleet: FleetClient) -> FleetStatus:
        async with asyncio.timeout(timeout_s):
            return await work(fleet)

    try:
        answer: FleetStatus = _on_cluster(run, within)
    except TimeoutError:
        sys.stderr.write(f"Not done after {timeout_s:g} s; `baton status` tells more.\n")
        return 1
    sys.stdout.write(describe(run, answer))
    return 0


async def _settled(fleet: FleetClient, answer: FleetStatus) -> FleetStatus:
    """Wait until every wanted worker serves and every surplus one is gone."""
    return await _watched(fleet, answer, lambda status: status.is_settled)


async def _watched(fleet: FleetClient, answer: FleetStatus, is_done: Callable[[FleetStatus], bool]) -> FleetStatus:
    """Show progress until it is done."""
    progress = Progress()
    progress.starting(answer)
    while not is_done(answer):
        answer = await fleet.watch(answer.version, WATCH_S)
        progress.starting(answer)
    return answer


def _is_gone(status: FleetStatus, worker_id: str, incarnation: int) -> bool:
    """Whether a life of a worker is over."""
    return (worker_id, incarnation) not in {(member.worker_id, member.incarnation) for member in status.members}


def _on_cluster(run: RunFile, work: Any) -> Any:
    """Connect to Ray, run `work(fleet)`, disconnect. `ray_local.prepare` has set the environment."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Ray's threads print other processes' troubles
            ray.init(address=run.ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            return asyncio.run(work(FleetClient.find()))
    except (ConnectionError, ValueError, WorkerLost) as error:
        raise ConfigError(f"the Baton at {run.url} does not answer: {first_line(error)}") from None
    finally:
        ray.shutdown()


def describe(run: RunFile, answer: FleetStatus) -> str:
    """A table for people."""
    wanted = _counts(answer.wanted)
    baton = f"{run.url}  model {run.model}" if run.model else run.url
    lines = [f"{baton}  {'ready' if answer.ready else 'not ready'}  (wanted: {wanted})"]
    rows: list[tuple[str, ...]] = [("WORKER", "STATE", "LIFE", "PID", "RUNNING", "WAITING", "FREE PAGES", "ADDRESS")]
    rows += [_row(member) for member in answer.members]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if answer.autoscale is not None:
        lines += _autoscale(answer.autoscale)
    return "\n".join(lines) + "\n"


def _counts(by_role: dict[str, int]) -> str:
    return ", ".join(f"{count} {role}" for role, count in by_role.items())


def _autoscale(view: AutoscaleView) -> list[str]:
    """What the autoscaler wants, and its last decisions with their reasons, the latest first."""
    lines = [f"autoscale: {view.mode}, {view.waits_for or f'wants {_counts(view.target)}'}"]
    if view.ceilings:
        lines.append(f"  a slice was drained: no more than {_counts(view.ceilings)} until `baton scale`")
    for decision in reversed(view.decisions[-SHOWN_DECISIONS:]):
        at = time.strftime("%H:%M:%S", time.localtime(decision.at))
        lines += [f"  {at}  {decision.text}", *(f"            {reason}" for reason in decision.reasons)]
    return lines


def _row(member: MemberStatus) -> tuple[str, ...]:
    load, info = member.load, member.info
    state = member.state.value
    if member.progress and member.state is MemberState.STARTING:
        state += f" ({member.progress})"
    if member.becomes is not None:
        state += f" (then {member.becomes})"
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
