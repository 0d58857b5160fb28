"""A decode worker: one replica, the overlap scheduler, gateways, and KV from prefill workers. deploy/ wraps it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from decode_worker.scheduler import DecodeScheduler
from engine_core.config import EngineConfig
from engine_core.errors import BatonError, ProtocolError
from engine_core.messages import Decode, Load, PeerAddress, Prefill, TokenChunk, WorkerInfo
from engine_core.replica_loader import open_replica
from engine_core.types import Role
from kv_transfer.base import Layers
from kv_transfer.compiled.digester import build_digester
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.host_links import HostLinks
from kv_transfer.joined_receiver import JoinedReceiver
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.worker_host import Key, WorkerHost

logger = logging.getLogger(__name__)

TICKET_LEASE_MS = 600_000  # a prefill queue may be long; a dead peer is noticed by its connection, not by this


class DecodeWorker:
    """Generates; its prompts are computed elsewhere, or here.

    Args:
        config: of the engine.
        model_dir: the checkpoint.
        worker_id: its name in the fleet.
        incarnation: which life of that name this is.
        listen: host, port for gateways and for decode workers; a port of 0 takes any free one.
        secret: shared by gateways and workers; None binds to loopback only.
        progress: told short sentences while weights load and buckets compile.
        hosts: connections to the worker's other hosts, where this is the first of several.

    Raises:
        ConfigError, CheckpointError: this model cannot be served so.
        WorkerDied: another host of it is gone.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        worker_id: str,
        incarnation: int,
        listen: PeerAddress,
        *,
        secret: bytes | None = None,
        progress: Callable[[str], None] = lambda _: None,
        hosts: HostLinks | None = None,
    ) -> None:
        self._hosts = hosts
        self._replica = open_replica(config, model_dir, progress, decodes=True, followers=hosts)
        resolved = self._replica.resolved
        self._identity = KvIdentity.of(worker_id, incarnation, resolved.spec, self._replica.identity, resolved.layout)
        self._secret = secret
        self._options = TransferOptions.of(config.transfer, build_digester(config.compile_cache))
        self._options.check_secret(secret)
        self._info = self._replica.worker_info(Role.DECODE, worker_id, incarnation, listen, self._identity.fingerprint)
        self._scheduler = DecodeScheduler(self._replica, self)
        self._host = WorkerHost(
            secret=secret,
            scheduler=self._scheduler,
            accept=self._accept,
            on_cancel=self._on_cancel,
            replica=self._replica,
            step_timeout_s=config.step_timeout_s,
        )
        self._serials = itertools.count(1)
        self._receiver: JoinedReceiver

    async def start(self) -> WorkerInfo:
        """Listen and begin to work."""
        self._receiver = JoinedReceiver(self._identity, self._secret, self, self._options)
        await self._receiver.start()
        self._info = await self._host.start(self._info.address.host, self._info)
        return self._info

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests; finish those at hand."""
        await self._host.drain(timeout_s)

    async def stop(self) -> None:
        """Close everything."""
        await self._host.stop()
        await self._receiver.close()
        if self._hosts is not None:
            self._hosts.close()

    def info(self) -> WorkerInfo:
        """Who this is."""
        return self._info

    def load(self) -> Load:
        """How busy it is."""
        return self._host.load()

    @property
    def healthy(self) -> bool:
        """Whether the engine thread and the data plane are alive."""
        return self._host.healthy and self._receiver.healthy

    # DecodeEvents, on the engine thread.

    def reserved(self, key: Key, prefill: PeerAddress, wanted: list[tuple[int, int]]) -> None:
        """Ask the prefill worker for what is lacking."""
        landing = tuple(Landing(index, generation) for index, generation in wanted)
        self._replica.stats.hand_over_begins(key, f"{prefill.host}:{prefill.kv_port}")
        self._receiver.request(prefill, Ticket(*key, next(self._serials), landing, TICKET_LEASE_MS))

    def tokens(self, chunks: list[TokenChunk]) -> None:
        """One frame per step and gateway."""
        self._host.emit(chunks)

    def failed(self, key: Key, error: BatonError) -> None:
        """The gateway places the request again."""
        self._host.fail(key, error)

    # ReceiverEvents, on the event loop.

    def on_blocks(
        self, request_id: str, epoch: int, block_indices: Sequence[int], layers: Layers, generations: Sequence[int]
    ) -> None:
        """Verified blocks: written between steps."""
        num_bytes = len(block_indices) * self._identity.layout.block_bytes
        self._replica.stats.hand_over_received((request_id, epoch), num_bytes)
        self._host.post(lambda: self._scheduler.land((request_id, epoch), block_indices, layers, generations))

    def on_done(self, request_id: str, epoch: int, first_token: TokenChunk, lost: Sequence[int]) -> None:
        """The prompt is here, or can be computed; a first token that ended the answer ends the request."""
        if lost:
            logger.warning("%d blocks of %s were lost on the way and are computed here", len(lost), request_id)
        self._replica.stats.hand_over_ended((request_id, epoch), failed=False)
        self._host.post(lambda: self._scheduler.landed((request_id, epoch), first_token, lost))
        if first_token.finish_reason is not None:
            self._host.end((request_id, epoch))

    def on_failed(self, request_id: str, epoch: int, error: BatonError) -> None:
        """The hand-over failed."""
        self._replica.stats.hand_over_ended((request_id, epoch), failed=True)
        self._host.post(lambda: self._scheduler.fail((request_id, epoch), error))

    def _accept(self, message: Prefill | Decode) -> None:
        if isinstance(message, Prefill):
            key = (message.request.request_id, message.request.epoch)
            self._host.fail(key, ProtocolError("this is a decode worker"))
            return
        self._scheduler.add(message.request, message.prefill)

    def _on_cancel(self, key: Key) -> None:
        self._receiver.cancel(*key)
        self._replica.stats.hand_over_cancelled(key)
