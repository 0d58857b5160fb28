"""What every transport shares: calls from any thread in, effects of a hand-off core out, host memory accounted for.

A transport subclasses these two, gives each connection a link, and reports what its links hear.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from engine_core.errors import BatonError
from engine_core.messages import PeerAddress, TokenChunk
from engine_core.models.spec import ModelSpec
from kv_transfer import handoff
from kv_transfer.base import Layers, ReceiverEvents, SenderEvents
from kv_transfer.blocks import HostBlocks, LandedBlocks, as_layers, as_rows
from kv_transfer.handoff import Effect, Key, ReceiverCore, SenderCore
from kv_transfer.layout import BlockLayout, CacheShape, fingerprint
from kv_transfer.repaging import Repaging
from kv_transfer.ticket import Ticket
from kv_transfer.wire import KvBlocks

TICK_S = 0.5
DEFAULT_INFLIGHT_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class KvIdentity:
    """Which life of which worker this is, and whom it may exchange KV with."""

    worker_id: str
    incarnation: int
    fingerprint: str
    layout: BlockLayout

    def part(self, first_kv_head: int, num_kv_heads: int) -> KvIdentity:
        """The same worker, for some of its KV heads."""
        return replace(self, layout=self.layout.part(first_kv_head, num_kv_heads))

    def facing(self, address: PeerAddress) -> KvIdentity:
        """The same worker, for the KV heads that the host there hands over: all, where it names none."""
        assert len(address.kv_shards) <= 1, "one hand-off for each host: see joined_receiver"
        identity = self
        for shard in address.kv_shards:
            identity = self.part(shard.first_head, shard.num_heads)
        return identity

    @classmethod
    def of(cls, worker_id: str, incarnation: int, spec: ModelSpec, weights: str, cache: CacheShape) -> KvIdentity:
        """The identity of a worker.

        Args:
            worker_id: its name in the fleet.
            incarnation: which life of it.
            spec: of the model.
            weights: names the weights and how they are computed with.
            cache: the device cache.
        """
        layout = BlockLayout.of(cache, spec.kv_scales)
        return cls(
            worker_id=worker_id,
            incarnation=incarnation,
            fingerprint=fingerprint(spec, weights, layout),
            layout=layout,
        )


class OutLink(Protocol):
    """A prefill worker's way to one decode worker: a queue.

    Attributes:
        layout: of decode's blocks.
    """

    layout: BlockLayout

    def put(self, item: handoff.Send | handoff.SendBlocks) -> None:
        """Send behind all that was put before."""
        ...

    def unsend(self, key: Key) -> None:
        """Drop what has not begun to leave."""
        ...


class Ticker:
    """Calls `action` every `TICK_S` until stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
        self._loop = loop
        self._action = action
        self._handle = loop.call_later(TICK_S, self._tick)

    def stop(self) -> None:
        """No more ticks."""
        self._handle.cancel()

    def _tick(self) -> None:
        self._handle = self._loop.call_later(TICK_S, self._tick)
        self._action()


class SenderEndpoint:
    """A KvSender but for the connections. Construct on the event-loop thread."""

    def __init__(self, identity: KvIdentity, events: SenderEvents, max_inflight_bytes: int) -> None:
        self.identity = identity
        self.links: set[OutLink] = set()
        self.core = SenderCore(self._conversion_for)
        self.loop = asyncio.get_running_loop()
        self._events = events
        self._max_inflight_bytes = max_inflight_bytes
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._posted_bytes = 0  # handed over by other threads, not seen by the loop yet
        self._settled_bytes = 0  # held by the core
        self._room = asyncio.Event()
        self._room.set()
        self._ticker = Ticker(self.loop, self.on_tick)

    @property
    def inflight_bytes(self) -> int:
        """See KvSender."""
        return self._posted_bytes + self._settled_bytes

    @property
    def writable(self) -> bool:
        """See KvSender."""
        return self.inflight_bytes < self._max_inflight_bytes

    async def wait_writable(self) -> None:
        """See KvSender."""
        while not self.writable:
            self._room.clear()
            await self._room.wait()

    def offer(self, request_id: str, epoch: int, lease_s: float) -> None:
        """See KvSender."""
        self._post(lambda: self.core.offer(self.loop.time(), (request_id, epoch), lease_s))

    def send_blocks(self, request_id: str, epoch: int, block_indices: Sequence[int], layers: Layers) -> None:
        """See KvSender."""
        indices = tuple(int(index) for index in block_indices)
        self.send_host_blocks(
            request_id, epoch, indices, HostBlocks(as_rows(layers, len(indices), self.identity.layout), None)
        )

    def send_host_blocks(self, request_id: str, epoch: int, indices: tuple[int, ...], blocks: HostBlocks) -> None:
        """`send_blocks` of what has been checked, and may lie in shared memory."""
        num_bytes = len(indices) * self.identity.layout.block_bytes
        with self._lock:
            self._posted_bytes += num_bytes

        def act() -> list[Effect]:
            with self._lock:
                self._posted_bytes -= num_bytes
            return self.core.send_blocks(self.loop.time(), (request_id, epoch), indices, blocks, num_bytes)

        self._post(act)

    def finish(self, request_id: str, epoch: int, first_token: TokenChunk) -> None:
        """See KvSender."""
        self._post(lambda: self.core.finish(self.loop.time(), (request_id, epoch), first_token))

    def abort(self, request_id: str, epoch: int, error: BatonError) -> None:
        """See KvSender."""
        self._post(lambda: self.core.abort(self.loop.time(), (request_id, epoch), error))

    def on_tick(self) -> None:
        """Leases."""
        self.apply(self.core.tick(self.loop.time()))

    def apply(self, effects: list[Effect]) -> None:
        """Carry the core's effects out."""
        for effect in effects:
            match effect:
                case handoff.Send() | handoff.SendBlocks():
                    cast(OutLink, effect.peer).put(effect)
                case handoff.Unsend(peer, key):
                    cast(OutLink, peer).unsend(key)
                case handoff.Ticketed(ticket):
                    self._events.on_ticket(ticket)
                case handoff.Cancelled((request_id, epoch), error):
                    self._events.on_cancel(request_id, epoch, error)
        self.account()

    def account(self) -> None:
        """Count what is held; to be called whenever the core was told something."""
        self._settled_bytes = self.core.held_bytes
        if self.writable:
            self._room.set()

    def stop(self) -> None:
        """No more ticks."""
        self._ticker.stop()

    def _conversion_for(self, peer: Any) -> Repaging | None:
        mine, theirs = self.identity.layout, cast(OutLink, peer).layout
        same = (mine.wire_fields, mine.first_kv_head) == (theirs.wire_fields, theirs.first_kv_head)
        return None if same else Repaging(mine, theirs)

    def _post(self, act: Callable[[], list[Effect]]) -> None:
        call = self.loop.call_soon if threading.get_ident() == self._thread else self.loop.call_soon_threadsafe
        call(lambda: self.apply(act()))


class ReceiverEndpoint(ABC):
    """A KvReceiver but for the connections. Construct on the event-loop thread."""

    def __init__(self, identity: KvIdentity, events: ReceiverEvents) -> None:
        self.identity = identity
        self.core = ReceiverCore()
        self.loop = asyncio.get_running_loop()
        self._events = events
        self._ticker = Ticker(self.loop, self.on_tick)

    @property
    def num_open(self) -> int:
        """Hand-offs under way."""
        return len(self.core)

    def request(self, address: PeerAddress, ticket: Ticket) -> None:
        """See KvReceiver."""
        self.loop.call_soon_threadsafe(
            lambda: self.apply(self.core.request(self.loop.time(), self.link_to(address), ticket))
        )

    def cancel(self, request_id: str, epoch: int) -> None:
        """See KvReceiver."""
        self.loop.call_soon_threadsafe(lambda: self.apply(self.core.cancel((request_id, epoch))))

    def on_tick(self) -> None:
        """Leases."""
        self.apply(self.core.tick(self.loop.time()))

    def apply(self, effects: list[Effect], landed: LandedBlocks | None = None) -> None:
        """Carry the core's effects out; `landed` is what a `Landed` brings."""
        for effect in effects:
            match effect:
                case handoff.Send(peer, message):
                    self.send(peer, message)
                case handoff.Landed(header):
                    assert landed
                    self.deliver(header, landed)
                case handoff.Done((request_id, epoch), first_token, lost):
                    self._events.on_done(request_id, epoch, first_token, lost)
                case handoff.Lost((request_id, epoch), error):
                    self._events.on_failed(request_id, epoch, error)

    def deliver(self, header: KvBlocks, landed: LandedBlocks) -> None:
        """Give verified blocks to the worker."""
        first, end = header.heads  # checked against what was asked of the peer
        layers = as_layers(landed.rows, self.identity.layout.part(first, end - first))
        self._events.on_blocks(header.request_id, header.epoch, header.blocks, layers, header.generations)

    def stop(self) -> None:
        """No more ticks."""
        self._ticker.stop()

    @abstractmethod
    def link_to(self, address: PeerAddress) -> Any:
        """The link to a prefill worker, opened if need be; its failure is reported later."""

    @abstractmethod
    def send(self, peer: Any, message: Any) -> None:
        """Send on a link; silently dropped when it is gone."""
