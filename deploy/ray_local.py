"""A private Ray on this machine: loopback only, its own directory and token, nothing left behind.

Ray reads part of its settings from the environment when it is imported, in every process, so `prepare` comes first
and modules that import ray are imported after it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import time
from pathlib import Path

import msgspec

OBJECT_STORE_BYTES = 100 << 20  # Ray's own use: tokens and KV never pass through it
STOP_GRACE_S = 5.0
KILLED_S = 5.0  # in which a process that was killed is gone, however busy the machine
TOKEN = "token"  # file name in the run directory


def prepare(token_path: Path) -> None:
    """Set Ray's environment for this process and its children; before ray is imported."""
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_TOKEN_PATH") != str(token_path):
        raise RuntimeError("ray was imported before its environment was prepared")
    root = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != root]
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token_path),
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # in spite of its name: every part of Ray binds to 127.0.0.1
        RAY_USAGE_STATS_ENABLED="0",
        RAY_DEDUP_LOGS="0",
        RAY_worker_niceness="0",  # by default 15: whatever else runs on the machine would starve the engines
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # actors that reserve no GPU still see those of the user
        RAY_SERVE_LOG_TO_STDERR="0",
        PYTHONPATH=os.pathsep.join([root, *paths]),  # workers import our packages, installed or not
    )


def create_token(path: Path) -> None:
    """Write a new secret that only this user can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


class Process(msgspec.Struct, frozen=True):
    """A process id and its start time, which together are never reused."""

    pid: int
    started: int


def descendants() -> list[Process]:
    """Every process below this one (Linux; elsewhere none are listed)."""
    parents: dict[int, int] = {}
    started: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields is not None:
            parents[int(entry.name)], started[int(entry.name)] = fields
    found, queue = [], [os.getpid()]
    while queue:
        parent = queue.pop()
        children = [pid for pid, above in parents.items() if above == parent]
        found += [Process(pid, started[pid]) for pid in children]
        queue += children
    return found


def process(pid: int) -> Process | None:
    """The process that has this id; None where none runs."""
    fields = _stat(pid)
    return None if fields is None else Process(pid, fields[1])


def end(processes: list[Process], grace_s: float) -> None:
    """Wait for processes to end, then kill those that have not, and wait until they write no file any more."""
    left = _until_gone(processes, grace_s)
    for one in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    _until_gone(left, KILLED_S)


def _until_gone(processes: list[Process], seconds: float) -> list[Process]:
    """Those that live after so long."""
    deadline = time.monotonic() + seconds
    left = [one for one in processes if _lives(one)]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [one for one in left if _lives(one)]
    return left


def _lives(one: Process) -> bool:
    return process(one.pid) == one


def _stat(pid: int) -> tuple[int, int] | None:
    """(parent, start time) of a process that runs; None for one that ended, zombies included."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    state, parent, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else (int(parent), int(rest[17]))
