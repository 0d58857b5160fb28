"""From a configuration to a running `deploy.serve`: what can be refused is refused here, before Ray starts."""

from __future__ import annotations

import errno
import importlib
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy import ray_local, run_file
from deploy.config import ServeConfig
from deploy.log import log_to_file
from deploy.progress import Progress
from engine_core import config_loader
from engine_core.config import EngineConfig
from engine_core.errors import ConfigError
from engine_core.types import Role

GATEWAY_CLASS = "deploy.gateway:RouterGateway"
WORKER_CLASSES = {
    Role.PREFILL: "prefill_worker.worker:PrefillWorker",
    Role.DECODE: "decode_worker.worker:DecodeWorker",
}
ALIASES = {
    "prefill": "fleet.prefill",
    "decode": "fleet.decode",
    "colocated": "fleet.colocated",
    "model": "engine.model.path",
    **{name: f"engine.{name}" for name in EngineConfig.__dataclass_fields__ if name != "model"},
}


def read_config(flags: Sequence[str], toml_path: Path | None) -> ServeConfig:
    """Defaults < TOML < flags. Short flags stand for long ones: `--cache.page_size` for `--engine.cache.page_size`."""
    return config_loader.load(ServeConfig, [_lengthen(flag) for flag in flags], toml_path)


def _lengthen(flag: str) -> str:
    if not flag.startswith("--"):
        return flag
    name, equals, value = flag[2:].partition("=")
    head, dot, rest = name.partition(".")
    if dot and head in EngineConfig.__dataclass_fields__:
        return f"--engine.{head}.{rest}{equals}{value}"
    return f"--{ALIASES.get(name, name)}{equals}{value}"


def launch(
    config: ServeConfig,
    *,
    model_dir: Path,
    run_files: Path,
    worker_classes: Mapping[Role, str],
    gateway_class: str,
    timeline: bool,
) -> int:
    """Serve until a signal comes; returns the exit status."""
    progress = Progress(timeline=timeline, started=time.monotonic())
    check_port(config.host, config.port)
    run_dir = Path(tempfile.mkdtemp(prefix="baton-"))
    log_dir = Path(config.log_dir).expanduser() if config.log_dir else run_dir / "logs"
    log_to_file(log_dir, "serve")
    token_path = run_dir / ray_local.TOKEN
    ray_local.create_token(token_path)
    ray_local.prepare(token_path)
    progress.say("Starting Ray ...")
    serve = importlib.import_module("deploy.serve")
    plan = serve.ServePlan(
        config=config,
        model_dir=str(model_dir),
        run_dir=run_dir,
        log_dir=log_dir,
        run_files=run_files,
        worker_classes=dict(worker_classes),
        gateway_class=gateway_class,
    )
    return int(serve.run(plan, progress))


def check_port(host: str, port: int) -> None:
    """ConfigError when something listens there already (replicas share the port, so they would not notice)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"port {port} on {host} is already in use; choose another one with --port") from None
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def default_run_files() -> Path:
    """Where running Batons announce themselves."""
    return run_file.DIRECTORY.expanduser()
