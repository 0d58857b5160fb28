"""A host of a decode worker that is not its first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine_core.config import EngineConfig
from engine_core.errors import BatonError
from engine_core.replica_loader import open_follower
from kv_transfer.leader_link import LeaderLink


class DecodeFollower:
    """Makes the device calls of the leader; KV that lands is the leader's to receive, and comes from it.

    Args:
        config: of the engine, the leader's.
        model_dir: the checkpoint on this host.
        host: of no use here: it listens nowhere.
        leader: connected.
        progress: told short sentences while weights load.

    Raises:
        ConfigError, CheckpointError: this model cannot be served so; the leader knows.
        WorkerDied: the leader is gone.
    """

    def __init__(
        self, config: EngineConfig, model_dir: Path, host: str, leader: LeaderLink, progress: Callable[[str], None]
    ) -> None:
        self._leader = leader
        try:
            begin = leader.wait_begin()
            self._follower = open_follower(config, model_dir, progress, decodes=True, begin=begin, exports=None)
        except BatonError as error:
            leader.fail(error)
            raise

    async def start(self) -> None:
        """Begin to follow."""
        self._leader.serve(self._follower, None)

    async def stop(self) -> None:
        """Hang up."""
        self._leader.close()

    @property
    def healthy(self) -> bool:
        """Whether it follows."""
        return self._leader.healthy
