"""`baton serve` whose gateway loses block events on purpose: python -m tests.e2e.lossy_gateway [serve flags].

While the file `LOSE` exists, events of what worker caches gain and lose do not reach the index. All else is real.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from deploy import launch
from engine_core.messages import BlockEvents, PeerAddress
from router.clients import WorkerClient, connect_with
from router.config import GatewayConfig
from router.server import Gateway

LOSE = "lose-block-events"  # in the home directory


class _Lossy:
    """Hears what a connection says, but for some of it."""

    def __init__(self, events: Any) -> None:
        self._events = events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._events, name)

    def on_blocks(self, client: Any, message: Any) -> None:
        if not (isinstance(message, BlockEvents) and (Path.home() / LOSE).exists()):
            self._events.on_blocks(client, message)


class LossyGateway(Gateway):
    """See the module."""

    def __init__(self, config: GatewayConfig, model_dir: Path, secret: bytes | None) -> None:
        connect = connect_with(secret, "lossy")

        def make(address: PeerAddress, events: Any) -> WorkerClient:
            return connect(address, _Lossy(events))

        super().__init__(config, model_dir, secret, make)


def main(flags: list[str]) -> int:
    config = launch.read_config(flags, None)
    return launch.launch(
        config,
        model_dir=Path(config.engine.model.path),
        run_files=launch.default_run_files(),
        worker_classes=launch.WORKER_CLASSES,
        gateway_class="tests.e2e.lossy_gateway:LossyGateway",
        timeline=True,
        secret=None,
        ray_address=None,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
