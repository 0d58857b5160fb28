"""From a configuration to a running `deploy.serve`: what can be refused is refused here, before Ray starts."""

from __future__ import annotations

import errno
import importlib
import secrets
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deploy import ray_local, run_file
from deploy.config import DEMO, NODE, ServeConfig
from deploy.log import log_to_file
from deploy.progress import Progress
from engine_core import config_loader
from engine_core.errors import ConfigError
from engine_core.types import Role
from kv_transfer.auth import check_bind

GATEWAY_CLASS = "router.server:Gateway"
WORKER_CLASSES = {
    Role.PREFILL: "prefill_worker.worker:PrefillWorker",
    Role.DECODE: "decode_worker.worker:DecodeWorker",
}
ALIASES = {
    "model": "engine.model.path",
    "prefill": "fleet.prefill",
    "decode": "fleet.decode",
    "colocated": "fleet.colocated",
    "host": "gateway.host",
    "port": "gateway.port",
    "": "engine.",
}


def read_config(flags: Sequence[str], toml_path: Path | None) -> ServeConfig:
    """Defaults < TOML < flags. Fields of `engine` need no prefix on the command line."""
    return complete(config_loader.load(ServeConfig, flags, toml_path, ALIASES))


def complete(config: ServeConfig) -> ServeConfig:
    """Tell the gateway what the other sections imply."""
    gateway = config.gateway
    path = config.engine.model.path
    name = gateway.model_name if gateway.model_name != DEMO or path == DEMO else model_name(path)
    colocated = config.fleet.count(Role.PREFILL) == 0
    salt = gateway.block_salt or secrets.token_hex(16)
    cache = gateway.compile_cache or config.engine.compile_cache
    implied = replace(gateway, model_name=name, colocated=colocated, block_salt=salt, compile_cache=cache)
    return replace(config, gateway=implied)


def with_keys(config: ServeConfig, keys: tuple[str, ...]) -> ServeConfig:
    """The configuration with API keys from a file; ConfigError where it names some itself."""
    if config.gateway.api_keys:
        raise ConfigError("gateway.api_keys and --api-keys-file exclude each other")
    return replace(config, gateway=replace(config.gateway, api_keys=keys))


def model_name(path: str) -> str:
    """What clients call a model: its hub id, or its directory's name."""
    directory = Path(path).expanduser()
    return directory.resolve().name if directory.is_dir() else path


def describe_fields() -> str:
    """Every field of the configuration, for --help-config."""
    lines = []
    for field in config_loader.field_help(ServeConfig):
        name = field.name.removeprefix("engine.")
        default = "" if field.default in (None, "") else f" (default {field.default})"
        lines.append(f"--{name} {field.type}{default}\n      {field.comment}".rstrip())
    return "\n".join(lines) + "\n"


def launch(
    config: ServeConfig,
    *,
    model_dir: Path,
    run_files: Path,
    worker_classes: Mapping[Role, str],
    gateway_class: str,
    timeline: bool,
    secret: bytes | None,
    ray_address: str | None,
) -> int:
    """Serve until a signal comes; returns the exit status.

    Args:
        secret: shared by gateways and workers; needed where workers listen beyond this machine.
        ray_address: of the Ray cluster to join; None starts a private Ray on this machine.
    """
    check_secret(config, secret)
    progress = Progress(timeline=timeline, started=time.monotonic())
    check_port(config.gateway.host, config.gateway.port)
    run_dir = Path(tempfile.mkdtemp(prefix="baton-"))
    log_dir = Path(config.log_dir).expanduser() if config.log_dir else run_dir / "logs"
    log_to_file(log_dir, "serve")
    if ray_address is None:
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
        secret=secret,
        ray_address=ray_address,
    )
    return int(serve.run(plan, progress))


def check_secret(config: ServeConfig, secret: bytes | None) -> None:
    """ConfigError where a worker would refuse to listen: before anything starts."""
    host = config.fleet.host
    if host == NODE and secret is None:
        raise ConfigError("fleet.host is node: workers listen beyond this machine, which needs --secret-file")
    if host != NODE:
        check_bind(host, secret)


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
