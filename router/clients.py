"""The seam between the gateway and its connections to workers; `kv_transfer.control.ControlClient` is the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engine_core.messages import Cancel, Decode, Donate, PeerAddress, Prefill, SnapshotRequest, WorkerInfo
from kv_transfer.control import ControlClient, WorkerEvents


class WorkerClient(Protocol):
    """A connection to one worker that reconnects by itself until closed."""

    info: WorkerInfo | None
    heard_at: float

    def start(self) -> None:
        """Begin to connect."""
        ...

    def send(self, message: Prefill | Decode | Donate | Cancel | SnapshotRequest) -> bool:
        """Queue a message; raises WorkerDied when not connected."""
        ...

    async def close(self) -> None:
        """Hang up for good."""
        ...


MakeClient = Callable[[PeerAddress, WorkerEvents], WorkerClient]


def connect_with(secret: bytes | None, peer: str) -> MakeClient:
    """Real connections, proving `secret`; `peer` names this gateway in the workers' logs."""
    return lambda address, events: ControlClient(address, peer, secret, events)
