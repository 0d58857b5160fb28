"""A host of a prefill worker that is not its first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine_core.config import EngineConfig
from engine_core.errors import BatonError
from engine_core.host_commands import Export, ExportAbort, ExportCommand, ExportFinish, ExportOffer
from engine_core.messages import KvShard
from engine_core.replica_loader import open_follower
from kv_transfer.compiled.digester import build_digester
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handoff import error_named
from kv_transfer.handshake import TransferOptions
from kv_transfer.leader_link import LeaderLink
from kv_transfer.plane import open_sender
from kv_transfer.plane_sender import PlaneKvSender
from kv_transfer.sender import NetKvSender
from kv_transfer.ticket import Ticket, part_id


class PrefillFollower:
    """Makes the device calls of the leader, and hands over the KV heads that its own devices hold.

    Args:
        config: of the engine, the leader's.
        model_dir: the checkpoint on this host.
        host: where to listen for decode workers.
        leader: connected.
        progress: told short sentences while weights load.

    Raises:
        ConfigError, CheckpointError: this model cannot be served so; the leader knows.
        WorkerDied: the leader is gone.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        host: str,
        leader: LeaderLink,
        progress: Callable[[str], None],
    ) -> None:
        self._leader = leader
        self._listen_host = host
        self._options = TransferOptions.of(config.transfer, build_digester(config.compile_cache))
        try:
            begin = leader.wait_begin()
            self._follower = open_follower(config, model_dir, progress, decodes=False, begin=begin, exports=self)
        except BatonError as error:
            leader.fail(error)
            raise
        resolved = self._follower.resolved
        # Every host of the worker comes to the same identity, from the same checkpoint.
        whole = KvIdentity.of(*leader.life, resolved.spec, resolved.fingerprint, resolved.layout)
        heads = self._follower.exported
        self._identity = whole.part(heads.first, heads.count) if heads.count else None
        self._sender: PlaneKvSender | NetKvSender | None = None

    async def start(self) -> None:
        """Listen for decode workers, begin to follow."""
        if self._identity is None:  # others hold the same heads
            self._leader.serve(self._follower, None)
            return
        sender = self._sender = open_sender(self._identity, self._leader.secret, self, self._options)
        port = await sender.start(self._listen_host, 0)
        self._leader.inflight_bytes = lambda: sender.inflight_bytes
        layout = self._identity.layout
        shard = KvShard(self._listen_host, port, layout.first_kv_head, layout.num_kv_heads)
        self._leader.serve(self._follower, shard)

    async def stop(self) -> None:
        """Close everything."""
        self._leader.close()
        if self._sender is not None:
            await self._sender.close()

    @property
    def healthy(self) -> bool:
        """Whether it follows, and can hand KV over."""
        return self._leader.healthy and (self._sender is None or self._sender.healthy)

    # Exports, on the thread that runs commands.

    def blocks(self, export: Export, layers: list[np.ndarray]) -> None:
        """Push blocks under the ticket."""
        assert self._sender is not None
        self._sender.send_blocks(self._part(export.request_id), export.epoch, export.blocks, layers)

    def tell(self, command: ExportCommand) -> None:
        """What the leader tells its own sender."""
        if self._sender is None:
            return
        key = self._part(command.request_id), command.epoch
        match command:
            case ExportOffer(_, _, lease_s):
                self._sender.offer(*key, lease_s)
            case ExportFinish(_, _, first_token):
                self._sender.finish(*key, first_token)
            case ExportAbort(_, _, code, message, retryable):
                self._sender.abort(*key, error_named(code, message, retryable))

    def _part(self, request_id: str) -> str:
        assert self._identity is not None
        return part_id(request_id, self._identity.layout.first_kv_head)

    # SenderEvents: what is wanted, and what has failed, the leader learns from the decode worker.

    def on_ticket(self, ticket: Ticket) -> None:
        """The leader's commands bring the blocks."""

    def on_cancel(self, request_id: str, epoch: int, error: BatonError) -> None:
        """The decode worker gives up the other parts, too."""
