"""How `baton status`, `scale` and `drain` find a Baton that runs on this machine: one small file per port."""

from __future__ import annotations

from pathlib import Path

import msgspec

from deploy.ray_local import Process, process
from engine_core.errors import ConfigError

DIRECTORY = Path("~/.cache/baton/run")


class RunFile(msgspec.Struct, frozen=True):
    """What another process of the same user needs in order to reach a running Baton.

    Attributes:
        token_path: of the private Ray's token; empty where Baton joined a Ray cluster, whose settings are the user's.
        log_dir: where its processes on this machine write.
    """

    server: Process
    url: str
    model: str
    ray_address: str
    token_path: str
    log_dir: str


def path(directory: Path, port: int) -> Path:
    """Where the Baton on `port` announces itself."""
    return directory / f"{port}.json"


def write(directory: Path, port: int, run: RunFile) -> Path:
    """Announce this Baton. The caller removes the file."""
    directory.mkdir(parents=True, exist_ok=True)
    announced = path(directory, port)
    partial = announced.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(run))
    partial.rename(announced)
    return announced


def of_cluster(ray_address: str) -> RunFile:
    """The Baton of a Ray cluster, which may have announced itself on no machine: that of a RayService, say."""
    return RunFile(Process(0, 0), f"Ray cluster {ray_address}", "", ray_address, "", "")


def find(directory: Path, port: int | None) -> RunFile:
    """The Baton on `port`, or the only one there is; ConfigError says what runs instead."""
    running = {}
    for file in directory.glob("*.json") if directory.is_dir() else ():
        try:
            run = msgspec.json.decode(file.read_bytes(), type=RunFile)
        except (OSError, msgspec.MsgspecError):
            continue
        if process(run.server.pid) == run.server:
            running[file.stem] = run
    if port is None and len(running) == 1:
        return next(iter(running.values()))
    if str(port) in running:
        return running[str(port)]
    found = ", ".join(sorted(running)) or "none"
    wanted = "Several Batons run, choose one with --port" if port is None and running else "No Baton runs"
    wanted += "" if port is None else f" on port {port}"
    raise ConfigError(f"{wanted} (running on this machine: {found}). `baton serve` starts one.")
