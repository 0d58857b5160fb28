"""A prefill worker: one replica, a scheduler, ears for gateways and decode workers. Plain Python; deploy/ wraps it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from engine_core.config import EngineConfig
from engine_core.errors import BatonError, ProtocolError, RequestCancelled
from engine_core.host_commands import ExportAbort, ExportCommand, ExportFinish, ExportOffer
from engine_core.messages import Decode, KvShard, Load, PeerAddress, Prefill, TokenChunk, WorkerInfo
from engine_core.replica_loader import open_replica
from engine_core.types import Role
from kv_transfer.base import Layers
from kv_transfer.compiled.digester import build_digester
from kv_transfer.donor import Donor
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.host_links import HostLinks
from kv_transfer.host_loop import BEAT_S
from kv_transfer.outlet import Outlet
from kv_transfer.plane import open_receiver, open_sender
from kv_transfer.plane_link import PlaneProcess
from kv_transfer.plane_receiver import PlaneKvReceiver
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.worker_host import Key, WorkerHost
from prefill_worker.fetches import Source
from prefill_worker.scheduler import PrefillScheduler

logger = logging.getLogger(__name__)

POLL_S = 0.02
LAST_WORD_S = 0.2  # first tokens that follow the blocks are not acknowledged
FETCH_LEASE_MS = 1000  # a donor that has sent nothing for so long is given up
TICKET_LEASE_S = 120.0  # a prompt that no ticket comes for, because decode has no room, is given up after this long


class PrefillWorker:
    """Computes prompts and hands their KV over.

    Args:
        config: of the engine.
        model_dir: the checkpoint.
        worker_id: its name in the fleet.
        incarnation: which life of that name this is.
        listen: host, port for gateways and for decode workers; a port of 0 takes any free one.
        secret: shared by gateways and workers; None binds to loopback only.
        progress: told short sentences while weights load and buckets compile.
        hosts: connections to the worker's other hosts, where this is the first of several: each hands over the KV heads
            that its devices hold.

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
        self._replica = open_replica(config, model_dir, progress, decodes=False, followers=hosts)
        resolved = self._replica.resolved
        self._identity = KvIdentity.of(worker_id, incarnation, resolved.spec, self._replica.identity, resolved.layout)
        shards = self._replica.engine.shards
        if shards is not None:
            self._identity = self._identity.part(shards.exported[0].first, shards.exported[0].count)
        self._secret = secret
        self._options = TransferOptions.of(config.transfer, build_digester(config.compile_cache))
        self._options.check_secret(secret)
        self._info = self._replica.worker_info(Role.PREFILL, worker_id, incarnation, listen, self._identity.fingerprint)
        self._scheduler = PrefillScheduler(self._replica, self)
        self._host = WorkerHost(
            secret=secret,
            scheduler=self._scheduler,
            accept=self._accept,
            on_cancel=self._on_cancel,
            replica=self._replica,
            step_timeout_s=config.step_timeout_s,
        )
        self._outlet: Outlet
        self._donor: Donor
        self._receiver: PlaneKvReceiver | NetKvReceiver | None = None
        self._serials = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop

    async def start(self) -> WorkerInfo:
        """Listen and begin to work."""
        self._loop = asyncio.get_running_loop()
        address = self._info.address
        process = PlaneProcess(1 if self._hosts is not None else 2)
        sender = open_sender(self._identity, self._secret, self, self._options, process)
        sender.on_refused = lambda code: self._replica.stats.refused.update([code])
        kv_port = await sender.start(address.host, address.kv_port)
        self._outlet = Outlet(sender, lambda: self._host.post(lambda: None))
        memory, gather = self._replica.memory, self._replica.engine.gather
        self._donor = Donor(memory, gather, self._outlet, self._identity.layout.block_bytes)
        address = msgspec.structs.replace(address, kv_port=kv_port)
        if self._hosts is not None:
            layout = self._identity.layout
            own = KvShard(address.host, kv_port, layout.first_kv_head, layout.num_kv_heads)
            address = msgspec.structs.replace(address, kv_shards=(own, *self._hosts.kv_shards))
        if self._hosts is None:
            self._receiver = open_receiver(self._identity, self._secret, self, self._options, process)
            await self._receiver.start()
        info = msgspec.structs.replace(self._info, address=address)
        self._info = await self._host.start(address.host, info, self._donor if self._hosts is None else None)
        return self._info

    async def drain(self, timeout_s: float) -> None:
        """Take no new prompts; finish those at hand, and wait until decode workers have collected their blocks."""
        until = self._loop.time() + timeout_s
        await self._host.drain(timeout_s)
        if self._hosts is not None:
            await asyncio.sleep(2 * BEAT_S)  # so old is what is known of the other hosts
        while (self._inflight_bytes or self._donor.is_giving) and self._loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(LAST_WORD_S)

    async def stop(self) -> None:
        """Close everything."""
        await self._host.stop()
        await self._outlet.close()
        if self._receiver is not None:
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
        receives = self._receiver is None or self._receiver.healthy
        return self._host.healthy and self._outlet.sender.healthy and receives

    # PrefillEvents, on the engine thread.

    @property
    def writable(self) -> bool:
        """Whether more blocks are welcome; when not, the engine thread is woken once they are."""
        return self._outlet.writable

    def fetch(self, key: Key, donor: PeerAddress, wanted: list[tuple[int, int]]) -> None:
        """Ask the donor for what is lacking; its pages are held until it is asked."""
        assert self._receiver is not None
        landing = tuple(Landing(index, generation) for index, generation in wanted)
        if wanted:
            self._replica.stats.hand_over_begins(key, donor.kv_name)
        self._receiver.request(donor, Ticket(*key, next(self._serials), landing, FETCH_LEASE_MS))

    def fetch_abandoned(self, key: Key) -> None:
        """It took too long."""
        assert self._receiver is not None
        logger.warning("a donor is too slow: the rest of %s is computed here", key[0])
        self._receiver.cancel(*key)
        self._replica.stats.hand_over_ended(key, failed=True)

    def tokens(self, chunk: TokenChunk) -> None:
        """The first token goes straight to the gateway."""
        self._host.emit([chunk])

    def blocks(self, key: Key, indices: list[int], layers: list[np.ndarray]) -> None:
        """Push blocks under the ticket."""
        self._outlet.sender.send_blocks(*key, indices, layers)

    def failed(self, key: Key, error: BatonError) -> None:
        """The gateway places the request again, and its cancels free what both workers hold for it."""
        self._host.fail(key, error)

    def finished(self, key: Key, first_token: TokenChunk) -> None:
        """The last blocks are on their way."""
        self._tell_hosts(ExportFinish(*key, first_token))
        self._outlet.sender.finish(*key, first_token)
        self._host.end(key)

    # SenderEvents, on the event loop.

    def on_ticket(self, ticket: Ticket) -> None:
        """Decode wants these blocks, or another prefill worker some that are cached here."""
        key, wanted = ticket.key, sorted(landing.block_index for landing in ticket.landing)
        self._host.post(lambda: self._grant(key, wanted))

    def on_cancel(self, request_id: str, epoch: int, error: BatonError) -> None:
        """Who asked gave up or is gone, or nobody asked."""
        key = (request_id, epoch)
        self._host.post(lambda: self._give_up(key, error))
        self._host.end(key)

    # ReceiverEvents, on the event loop: of a donor.

    def on_blocks(
        self, request_id: str, epoch: int, block_indices: Sequence[int], layers: Layers, generations: Sequence[int]
    ) -> None:
        """Verified blocks: written between steps."""
        key = (request_id, epoch)
        self._replica.stats.hand_over_received(key, len(block_indices) * self._identity.layout.block_bytes)
        self._host.post(lambda: self._scheduler.fetched(key, block_indices, layers, generations))

    def on_done(self, request_id: str, epoch: int, first_token: TokenChunk, lost: Sequence[int]) -> None:
        """The donor has no more; its chunk is empty."""
        key = (request_id, epoch)
        self._replica.stats.hand_over_ended(key, failed=False)
        self._host.post(lambda: self._scheduler.fetch_ended(key, first_token, lost))

    def on_failed(self, request_id: str, epoch: int, error: BatonError) -> None:
        """The donor cannot, or is gone."""
        key = (request_id, epoch)
        logger.info("blocks of %s that were to be fetched are computed here: %s", request_id, error)
        self._replica.stats.hand_over_ended(key, failed=True)
        self._host.post(lambda: self._scheduler.fetch_failed(key))

    def _source_of(self, message: Prefill) -> Source | None:
        """Whom to fetch from: a donor of one host that is not this worker, where this one can fetch at all."""
        donor, own = message.donor, self._info.address
        if self._receiver is None or donor is None or not donor.kv_port or donor.kv_shards:
            return None
        if (donor.host, donor.kv_port) == (own.host, own.kv_port):
            return None
        return Source(donor, message.donor_blocks, message.deadline_ms / 1000)

    def _grant(self, key: Key, wanted: list[int]) -> None:
        self._scheduler.grant(key, wanted)
        self._donor.grant(key, wanted)

    def _accept(self, message: Prefill | Decode) -> None:
        if isinstance(message, Decode):
            key = (message.request.request_id, message.request.epoch)
            self._host.fail(key, ProtocolError("this is a prefill worker"))
            return
        request = message.request
        self._scheduler.add(request, self._source_of(message))
        self._tell_hosts(ExportOffer(request.request_id, request.epoch, TICKET_LEASE_S))
        self._outlet.sender.offer(request.request_id, request.epoch, TICKET_LEASE_S)

    def _on_cancel(self, key: Key) -> None:
        error = RequestCancelled("the gateway cancelled the request")
        self._abort_on_hosts(key, error)
        self._end_fetch(key)
        self._outlet.sender.abort(*key, error)

    def _give_up(self, key: Key, error: BatonError) -> None:
        """On the engine thread."""
        self._scheduler.cancel(key)
        self._end_fetch(key)
        self._donor.cancel(key)
        self._abort_on_hosts(key, error)

    def _end_fetch(self, key: Key) -> None:
        if self._receiver is not None:
            self._receiver.cancel(*key)
            self._replica.stats.hand_over_cancelled(key)

    def _abort_on_hosts(self, key: Key, error: BatonError) -> None:
        self._tell_hosts(ExportAbort(*key, error.code, str(error), error.retryable))

    def _tell_hosts(self, command: ExportCommand) -> None:
        """On the engine thread, as all that the other hosts are told."""
        if self._hosts is not None:
            self._hosts.send(command)

    @property
    def _inflight_bytes(self) -> int:
        return self._outlet.sender.inflight_bytes + (self._hosts.inflight_bytes if self._hosts else 0)
