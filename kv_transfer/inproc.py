"""The fake: the same contract within one process, with faults on demand. For tests of workers."""

from __future__ import annotations

import contextlib
import itertools
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_core.errors import LayoutMismatch, TransferError
from engine_core.messages import PeerAddress
from kv_transfer import handoff
from kv_transfer.base import ReceiverEvents, SenderEvents
from kv_transfer.blocks import HostBlocks, LandedBlocks, block_header, is_intact, payload_rows
from kv_transfer.digester import PlainDigester
from kv_transfer.endpoint import (
    DEFAULT_INFLIGHT_BYTES,
    KvIdentity,
    ReceiverEndpoint,
    SenderEndpoint,
)
from kv_transfer.handoff import Key


@dataclass(slots=True)
class Faults:
    """What goes wrong on the way; change it at any time. Messages of one link keep their order.

    Attributes:
        drop: chance that a message or a frame of blocks is lost.
        corrupt: chance that a frame of blocks arrives with one bit flipped.
        delay_s: each message waits this long.
        paused: nothing leaves the sender, as if the receiver did not read.
    """

    rng: random.Random
    drop: float = 0
    corrupt: float = 0
    delay_s: float = 0
    paused: bool = False

    def happens(self, chance: float) -> bool:
        """Roll the dice."""
        return chance > 0 and self.rng.random() < chance


class InprocNetwork:
    """Who listens where, and the faults between them."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.senders: dict[int, InprocKvSender] = {}

    def resume(self) -> None:
        """End a pause."""
        self.faults.paused = False
        for sender in self.senders.values():
            for link in list(sender.links):
                assert isinstance(link, _Link)
                link.pump()


class InprocKvSender(SenderEndpoint):
    """The fake KvSender."""

    def __init__(
        self,
        network: InprocNetwork,
        identity: KvIdentity,
        events: SenderEvents,
        max_inflight_bytes: int = DEFAULT_INFLIGHT_BYTES,
    ) -> None:
        super().__init__(identity, events, max_inflight_bytes)
        self.network = network
        self.port = 0

    async def start(self) -> int:
        """Listen; returns the port that `PeerAddress.kv_port` must name."""
        self.port = max(self.network.senders, default=0) + 1
        self.network.senders[self.port] = self
        return self.port

    async def close(self) -> None:
        """See KvSender."""
        self.stop()
        self.network.senders.pop(self.port, None)
        for link in list(self.links):
            assert isinstance(link, _Link)
            link.lose("prefill closed")


class InprocKvReceiver(ReceiverEndpoint):
    """The fake KvReceiver."""

    def __init__(self, network: InprocNetwork, identity: KvIdentity, events: ReceiverEvents) -> None:
        super().__init__(identity, events)
        self.network = network
        self.links: dict[int, _Link] = {}

    async def close(self) -> None:
        """See KvReceiver."""
        self.stop()
        for link in list(self.links.values()):
            self.core.on_peer_lost(link, TransferError("closing"))
            link.lose("decode closed")

    def link_to(self, address: PeerAddress) -> _Link:
        """See ReceiverEndpoint."""
        link = self.links.get(address.kv_port)
        if link is None:
            link = self.links[address.kv_port] = _Link(self, self.network.senders.get(address.kv_port), address)
            link.open()
        return link

    def send(self, peer: _Link, message: Any) -> None:
        """See ReceiverEndpoint."""
        peer.to_prefill(message)


class _Link:
    """Both ends of one connection."""

    def __init__(self, receiver: InprocKvReceiver, sender: InprocKvSender | None, address: PeerAddress) -> None:
        self.layout = receiver.identity.layout
        self._receiver = receiver
        self._sender = sender
        self._address = address
        self._outbox: list[handoff.Send | handoff.SendBlocks] = []
        self._frames = itertools.count()
        self._up = True

    def open(self) -> None:
        if self._sender is None:
            self._fail(TransferError(f"cannot connect to port {self._address.kv_port}"))
        elif self._sender.identity.fingerprint != self._receiver.identity.fingerprint:
            self._fail(LayoutMismatch("fingerprints differ"))
        else:
            self._sender.links.add(self)

    def lose(self, reason: str) -> None:
        """Cut the connection; both ends hear of it."""
        sender = self._sender
        if sender and self._up:
            sender.links.discard(self)
            self._outbox.clear()
            sender.loop.call_soon(lambda: sender.apply(sender.core.on_peer_lost(sender.loop.time(), self)))
        self._fail(TransferError(reason))

    def to_prefill(self, message: Any) -> None:
        sender = self._sender
        if sender:
            self._carry(lambda: sender.apply(sender.core.on_message(sender.loop.time(), self, message)))

    def put(self, item: handoff.Send | handoff.SendBlocks) -> None:
        if self._up:
            self._outbox.append(item)
            self._receiver.loop.call_soon(self.pump)

    def unsend(self, key: Key) -> None:
        self._outbox = [item for item in self._outbox if item.key != key]

    def pump(self) -> None:
        """Put on the way what may leave."""
        while self._outbox and not self._receiver.network.faults.paused:
            item = self._outbox.pop(0)
            if isinstance(item, handoff.Send):
                self._carry(self._deliver_message(item.message))
            else:
                self._carry(self._deliver_blocks(item))
        if self._sender:
            self._sender.account()

    def _deliver_message(self, message: Any) -> Callable[[], None]:
        receiver = self._receiver
        return lambda: receiver.apply(receiver.core.on_message(receiver.loop.time(), message))

    def _deliver_blocks(self, item: handoff.SendBlocks) -> Callable[[], None]:
        layout, receiver, faults = self._receiver.identity.layout, self._receiver, self._receiver.network.faults
        source: HostBlocks = item.source
        sums = source.checksums(item.places, item.key, item.blocks, PlainDigester())
        header = block_header(item.ticket, item.blocks, sums, layout, next(self._frames), None)
        payload = np.concatenate([row[list(item.places)].reshape(-1) for row in source.rows])
        if faults.happens(faults.corrupt):
            payload[faults.rng.randrange(len(payload))] ^= 1
        box = [payload]

        def deliver() -> None:
            arrived = box.pop()
            weakref.finalize(arrived, self._released, item).atexit = False
            rows = payload_rows(arrived, len(item.blocks), layout)
            intact = is_intact(header, PlainDigester().reader(rows).digests(range(len(item.blocks))))
            effects = receiver.core.on_blocks(receiver.loop.time(), header, intact)
            receiver.apply(effects, LandedBlocks(rows, None, 0, 0))

        return deliver

    def _released(self, item: handoff.SendBlocks) -> None:
        """On any thread: nobody holds these blocks any more."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._receiver.loop.call_soon_threadsafe(self._carry, lambda: self._tell_released(item))

    def _tell_released(self, item: handoff.SendBlocks) -> None:
        if self._sender:
            indices = [index for index, _ in item.blocks]
            self._sender.core.on_released(self._sender.loop.time(), item.key, item.shipment, indices)
            self._sender.account()

    def _carry(self, deliver: Callable[[], None]) -> None:
        faults = self._receiver.network.faults
        if self._up and not faults.happens(faults.drop):
            arrive = lambda: deliver() if self._up else None  # noqa: E731
            self._receiver.loop.call_later(faults.delay_s, arrive)

    def _fail(self, error: TransferError) -> None:
        self._up = False
        receiver = self._receiver
        if receiver.links.get(self._address.kv_port) is self:
            del receiver.links[self._address.kv_port]
        receiver.loop.call_soon(lambda: receiver.apply(receiver.core.on_peer_lost(self, error)))
