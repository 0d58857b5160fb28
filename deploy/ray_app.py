"""Baton as a Serve application, for KubeRay's RayService: `import_path: deploy.ray_app:build`.

Two deployments: `fleet`, a single replica that owns the fleet actor and with it the workers, and `gateway`. Serve
starts both; a gateway waits until the fleet is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from ray import serve
from ray.serve import Application

from deploy import checkpoint, launch
from deploy.config import ServeConfig
from deploy.fleet import FleetClient, FleetPlan
from deploy.fleet_types import GatewayPlan
from deploy.gateway_deployment import QUIET, gateway_app
from deploy.secret_files import read_keys, read_secret
from engine_core.errors import ConfigError
from engine_core.types import Role

DRAIN_MARGIN_S = 10.0


class AppArgs(msgspec.Struct, forbid_unknown_fields=True):
    """`args` of the application in serveConfigV2: paths that every pod mounts alike. Empty: none."""

    config_file: str
    secret_file: str
    api_keys_file: str = ""


class FleetKeeper:
    """Owns the fleet actor: Serve restarts it, and with it the workers, when it dies."""

    async def __init__(self, plan: FleetPlan) -> None:  # type: ignore[misc]  # Serve awaits it
        self._drain_timeout_s = plan.config.fleet.drain_timeout_s
        self._fleet = FleetClient.create(plan)
        await self._fleet.start()

    async def check_health(self) -> None:
        """Called by Serve. A fleet that can never become ready is not healthy; its reason is in the status."""
        async with asyncio.timeout(self._drain_timeout_s):
            status = await self._fleet.status()
        if status.fatal is not None:
            raise RuntimeError(status.fatal)

    async def __del__(self) -> None:
        """Called by Serve when the replica shall go."""
        await self._fleet.stop(self._drain_timeout_s)


def build(args: dict[str, Any]) -> Application:
    """The application.

    Args:
        args: see AppArgs.

    Raises:
        ConfigError: something in the files can never work.
    """
    try:
        paths = msgspec.convert(args, AppArgs)
    except msgspec.ValidationError as error:
        raise ConfigError(f"args of the application: {error}") from None
    config = launch.read_config((), Path(paths.config_file))
    if paths.api_keys_file:
        config = launch.with_keys(config, read_keys(Path(paths.api_keys_file)))
    secret = read_secret(Path(paths.secret_file))
    launch.check_secret(config, secret)
    return application(config, secret, launch.WORKER_CLASSES, launch.GATEWAY_CLASS)


def application(
    config: ServeConfig, secret: bytes, worker_classes: Mapping[Role, str], gateway_class: str
) -> Application:
    """The application of a configuration that was read. The model's directory is looked up on each machine.

    Args:
        worker_classes, gateway_class: `module:class`, imported where they run.
    """
    model = config.engine.model
    model_dir = str(checkpoint.DEMO_DIR) if model.path == "demo" else model.path
    log_dir = str(Path(config.log_dir or "/tmp/baton-logs").expanduser())
    fleet = serve.deployment(
        name="fleet",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.fleet.drain_timeout_s + DRAIN_MARGIN_S,
        logging_config=QUIET,
    )(FleetKeeper).bind(FleetPlan(config, model_dir, log_dir, dict(worker_classes), secret))
    plan = GatewayPlan(
        gateway_class=gateway_class,
        config=config,
        model_dir=model_dir,
        log_dir=log_dir,
        drain_timeout_s=config.fleet.drain_timeout_s,
        secret=secret,
    )
    return gateway_app(plan, fleet)
