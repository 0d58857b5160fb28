"""A decode worker: one replica, the overlap scheduler, gateways, and KV from prefill workers. deploy/ wraps it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from decode_worker.scheduler import DecodeScheduler
from engine_core.config import EngineConfig
from engine_core.errors import BatonError, ProtocolError, TransferError
from engine_core.messages import Decode, Load, PeerAddress, Prefill, TokenChunk, WorkerInfo
from engine_core.replica_loader import open_replica
from engine_core.types import Role
from kv_transfer.base import Layers
from kv_transfer.compiled.digester import build_digester
from kv_transfer.donor import Donor
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.host_links import HostLinks
from kv_transfer.joined_receiver import JoinedReceiver
from kv_transfer.outlet import Outlet
from kv_transfer.plane import open_sender
from kv_transfer.plane_link import PlaneProcess
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.worker_host import Key, WorkerHost

logger = logging.getLogger(__name__)

POLL_S = 0.02
COLLECT_S = 2.0  # for prefill workers that fetch from one that leaves; what they do not have by then they compute
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
        self._outlet: Outlet | None = None
        self._donor: Donor | None = None

    async def start(self) -> WorkerInfo:
        """Listen and begin to work."""
        process = PlaneProcess(1 if self._hosts is not None else 2)
        if self._hosts is None:
            await self._open_donor(process)
        self._receiver = JoinedReceiver(self._identity, self._secret, self, self._options, process)
        await self._receiver.start()
        self._info = await self._host.start(self._info.address.host, self._info, self._donor)
        return self._info

    async def _open_donor(self, process: PlaneProcess) -> None:
        """Listen for prefill workers that lack blocks which are cached here."""
        address, stats = self._info.address, self._replica.stats
        sender = open_sender(self._identity, self._secret, self, self._options, process)
        sender.on_refused = lambda code: stats.refused.update([code])
        kv_port = await sender.start(address.host, address.kv_port)
        self._info = msgspec.structs.replace(self._info, address=msgspec.structs.replace(address, kv_port=kv_port))
        self._outlet = Outlet(sender, lambda: self._host.post(lambda: None))
        memory, gather = self._replica.memory, self._replica.engine.gather
        self._donor = Donor(memory, gather, self._outlet, self._identity.layout.block_bytes)

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests; finish those at hand, and wait a moment for those who fetch blocks from here."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        await self._host.drain(timeout_s)
        until = min(until, loop.time() + COLLECT_S)
        while self._gives and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """Close everything."""
        await self._host.stop()
        await self._receiver.close()
        if self._outlet is not None:
            await self._outlet.close()
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
        sends = self._outlet is None or self._outlet.sender.healthy
        return self._host.healthy and self._receiver.healthy and sends

    @property
    def _gives(self) -> bool:
        """Whether a prefill worker still collects blocks here."""
        giving = self._donor is not None and self._donor.is_giving
        return giving or (self._outlet is not None and self._outlet.sender.inflight_bytes > 0)

    # DecodeEvents, on the engine thread.

    def reserved(self, key: Key, prefill: PeerAddress, wanted: list[tuple[int, int]]) -> None:
        """Ask the prefill worker for what is lacking."""
        landing = tuple(Landing(index, generation) for index, generation in wanted)
        self._replica.stats.hand_over_begins(key, prefill.kv_name)
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
        if first_token.is_empty:
            self.on_failed(request_id, epoch, TransferError("no first token: a donor answered in prefill's place"))
            return
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

    # SenderEvents, on the event loop.

    def on_ticket(self, ticket: Ticket) -> None:
        """A prefill worker wants blocks that are cached here."""
        donor, wanted = self._donor, sorted(landing.block_index for landing in ticket.landing)
        assert donor is not None
        self._host.post(lambda: donor.grant(ticket.key, wanted))

    def on_cancel(self, request_id: str, epoch: int, error: BatonError) -> None:
        """It gave up or is gone, or never asked."""
        donor = self._donor
        assert donor is not None
        self._host.post(lambda: donor.cancel((request_id, epoch)))

    def _accept(self, message: Prefill | Decode) -> None:
        if isinstance(message, Prefill):
            key = (message.request.request_id, message.request.epoch)
            self._host.fail(key, ProtocolError("this is a decode worker"))
            return
        self._scheduler.add(message.request, message.prefill)

    def _on_cancel(self, key: Key) -> None:
        self._receiver.cancel(*key)
        self._replica.stats.hand_over_cancelled(key)
