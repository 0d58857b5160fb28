"""The hand-off over TCP: one long-lived connection per (decode, prefill) pair, opened by decode when first needed.

Handshake: Challenge from prefill, KvHello from decode, KvHello (or Refused) from prefill.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from typing import Any

import numpy as np

from engine_core import errors
from engine_core.errors import ConfigError, LayoutMismatch, ProtocolError, TransferError, TransferTimeout
from engine_core.messages import PROTOCOL_VERSION, Challenge, PeerAddress, Refused
from kv_transfer import handoff
from kv_transfer.auth import Side, check_bind, make_proof, new_nonce, proves
from kv_transfer.base import ReceiverEvents, SenderEvents
from kv_transfer.connection import ROOM_BYTES, KvConnection
from kv_transfer.endpoint import (
    DEFAULT_INFLIGHT_BYTES,
    KvIdentity,
    ReceiverEndpoint,
    SenderEndpoint,
    merge,
    pick,
)
from kv_transfer.handoff import Key
from kv_transfer.wire import (
    MAX_HEADER_BYTES,
    KvBeat,
    KvBlocks,
    KvHello,
    block_header,
    check_header,
    encode,
    from_decode,
    from_prefill,
    verified,
)

logger = logging.getLogger(__name__)

FRAME_BYTES = 8 << 20  # payload of one frame, unless a single block is larger
HANDSHAKE_BYTES = 4096  # of a message before the handshake is over
HANDSHAKE_TIMEOUT_S = 5.0
BEAT_S = 1.0
SILENCE_S = 5.0  # a peer that said nothing for so long hangs, or is cut off
ALIGNMENT = 64  # of receive buffers: what lets a CPU device use them in place


class TcpKvSender(SenderEndpoint):
    """KvSender that listens for decode workers."""

    def __init__(
        self,
        identity: KvIdentity,
        secret: bytes | None,
        events: SenderEvents,
        max_inflight_bytes: int = DEFAULT_INFLIGHT_BYTES,
    ) -> None:
        super().__init__(identity, events, max_inflight_bytes)
        self.secret = secret
        self._waiting: set[_ToDecode] = set()  # in the handshake
        self._listener: socket.socket

    async def start(self, host: str, port: int) -> int:
        """Listen; port 0 takes any free one. Returns the port."""
        check_bind(host, self.secret)
        try:
            found = await self.loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self._listener = socket.create_server(found[0][4][:2], family=found[0][0], backlog=128)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
        self._listener.setblocking(False)
        self.loop.add_reader(self._listener, self._accept)
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        """See KvSender."""
        self.stop()
        self.loop.remove_reader(self._listener)
        self._listener.close()
        for link in [*self.links, *self._waiting]:
            assert isinstance(link, _ToDecode)
            link.connection.close(TransferError("closing"))
        await asyncio.sleep(0)

    def on_tick(self) -> None:
        """Leases, beats and silence."""
        super().on_tick()
        for link in list(self.links):
            assert isinstance(link, _ToDecode)
            _beat(link.connection, self.loop.time())

    def welcome(self, link: _ToDecode) -> None:
        """The handshake is over."""
        self._waiting.discard(link)
        self.links.add(link)

    def lost(self, link: _ToDecode, error: Exception) -> None:
        """The connection is gone."""
        if link in self._waiting:
            self._waiting.discard(link)
            logger.warning("a KV connection ended in its handshake: %s", error)
            return
        self.links.discard(link)
        logger.info("KV connection to decode worker %s ended: %s", link.worker_id, error)
        self.apply(self.core.on_peer_lost(self.loop.time(), link))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            link = _ToDecode(self, accepted)
            self._waiting.add(link)
            self.loop.call_later(HANDSHAKE_TIMEOUT_S, self._give_up_on, link)

    def _give_up_on(self, link: _ToDecode) -> None:
        if link in self._waiting:
            link.connection.close(ProtocolError("no KvHello in time"))


class _ToDecode:
    """Prefill's end of one connection: a queue of effects, turned into frames only as fast as they leave."""

    def __init__(self, owner: TcpKvSender, accepted: socket.socket) -> None:
        self.worker_id = ""
        self._owner = owner
        self._outbox: deque[handoff.Send | handoff.SendBlocks] = deque()
        self._outbox_bytes = 0
        self._nonce = new_nonce()
        self.connection = KvConnection(accepted, from_decode, self)
        self.connection.max_header_bytes = HANDSHAKE_BYTES
        self.connection.send([encode(Challenge(self._nonce))])

    @property
    def unsent_bytes(self) -> int:
        return self._outbox_bytes + self.connection.queued_bytes

    def put(self, item: handoff.Send | handoff.SendBlocks) -> None:
        if self.connection.closed:
            return
        if isinstance(item, handoff.SendBlocks):
            self._outbox_bytes += len(item.blocks) * self._owner.identity.layout.block_bytes
        self._outbox.append(item)
        self._fill()

    def unsend(self, key: Key) -> None:
        kept = [item for item in self._outbox if item.key != key]
        self._outbox = deque(kept)
        block_bytes = self._owner.identity.layout.block_bytes
        self._outbox_bytes = (
            sum(len(item.blocks) for item in kept if isinstance(item, handoff.SendBlocks)) * block_bytes
        )

    def _fill(self) -> None:
        while self._outbox and not self.connection.closed and self.connection.queued_bytes < ROOM_BYTES:
            item = self._outbox.popleft()
            if isinstance(item, handoff.Send):
                self.connection.send([encode(item.message)])
            else:
                self._send_frame(item)

    def _send_frame(self, item: handoff.SendBlocks) -> None:
        """Send the first frame's worth of `item`, put the rest back in front."""
        layout = self._owner.identity.layout
        n = max(1, FRAME_BYTES // layout.block_bytes)
        if len(item.blocks) > n:
            rest = handoff.SendBlocks(item.peer, item.ticket, item.blocks[n:], item.source, item.places[n:])
            self._outbox.appendleft(rest)
        blocks, places = item.blocks[:n], item.places[:n]
        header = block_header(item.ticket, blocks, pick(item.source, places, layout.layer_bytes), layout)
        self._outbox_bytes -= header.num_bytes
        self.connection.send([encode(header), *merge(item.source, places, layout.layer_bytes)])

    # ConnectionEvents

    def on_message(self, connection: KvConnection, message: Any) -> None:
        if isinstance(message, KvHello):
            self._on_hello(message)
        elif not self.worker_id:
            raise ProtocolError(f"{type(message).__name__} before KvHello")
        elif not isinstance(message, KvBeat):
            self._owner.apply(self._owner.core.on_message(self._owner.loop.time(), self, message))

    def on_header(self, connection: KvConnection, header: KvBlocks) -> memoryview | None:
        raise ProtocolError("a decode worker sent blocks")

    def on_payload(self, connection: KvConnection, header: KvBlocks, payload: memoryview) -> None:
        raise ProtocolError("a decode worker sent blocks")

    def on_room(self, connection: KvConnection) -> None:
        self._fill()
        self._owner.account()

    def on_closed(self, connection: KvConnection, error: Exception) -> None:
        self._outbox.clear()
        self._outbox_bytes = 0
        self._owner.lost(self, error)

    def _on_hello(self, hello: KvHello) -> None:
        if self.worker_id:
            raise ProtocolError("a second KvHello")
        identity, secret = self._owner.identity, self._owner.secret
        refusal = None
        if hello.protocol != PROTOCOL_VERSION or not hello.worker_id:
            refusal = Refused(ProtocolError.code, f"protocol {hello.protocol}, this worker speaks {PROTOCOL_VERSION}")
        elif not proves(hello.secret_proof, secret, Side.KV_CALLER, self._nonce, hello.nonce):
            refusal = Refused(ProtocolError.code, "wrong secret")
        elif hello.fingerprint != identity.fingerprint:
            text = f"fingerprint {hello.fingerprint} of {hello.worker_id} is not this worker's {identity.fingerprint}"
            refusal = Refused(LayoutMismatch.code, text)
        if refusal:
            self.connection.send([encode(refusal)])
            raise ProtocolError(refusal.message)
        self.worker_id = hello.worker_id
        self.connection.max_header_bytes = MAX_HEADER_BYTES
        proof = make_proof(secret, Side.KV_LISTENER, self._nonce, hello.nonce)
        self.connection.send([encode(_hello(identity, proof, b""))])
        self._owner.welcome(self)


class TcpKvReceiver(ReceiverEndpoint):
    """KvReceiver that connects to prefill workers."""

    def __init__(self, identity: KvIdentity, secret: bytes | None, events: ReceiverEvents) -> None:
        super().__init__(identity, events)
        self.secret = secret
        self._links: dict[tuple[str, int], _ToPrefill] = {}

    async def close(self) -> None:
        """See KvReceiver."""
        self.stop()
        for link in list(self._links.values()):
            await link.hang_up()
        self._links.clear()

    def on_tick(self) -> None:
        """Leases, beats and silence."""
        super().on_tick()
        for link in list(self._links.values()):
            if link.is_ready and link.connection:
                _beat(link.connection, self.loop.time())

    def link_to(self, address: PeerAddress) -> _ToPrefill:
        """See ReceiverEndpoint."""
        place = (address.host, address.kv_port)
        if place not in self._links:
            self._links[place] = _ToPrefill(self, place)
        return self._links[place]

    def send(self, peer: _ToPrefill, message: Any) -> None:
        """See ReceiverEndpoint."""
        peer.send(message)

    def lost(self, link: _ToPrefill, error: errors.BatonError) -> None:
        """The connection is gone, or never came to be: the next request opens another."""
        if self._links.get(link.place) is link:
            del self._links[link.place]
            self.apply(self.core.on_peer_lost(link, error))


class _ToPrefill:
    """Decode's end of one connection; messages wait until the handshake is over."""

    def __init__(self, owner: TcpKvReceiver, place: tuple[str, int]) -> None:
        self.place = place
        self.is_ready = False
        self.connection: KvConnection | None = None
        self._owner = owner
        self._early: list[Any] = []
        self._nonces = (b"", b"")
        self._error: errors.BatonError | None = None
        self._task = owner.loop.create_task(self._connect())

    def send(self, message: Any) -> None:
        if self.is_ready and self.connection:
            self.connection.send([encode(message)])
        else:
            self._early.append(message)

    async def hang_up(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self.connection:
            self._owner.core.on_peer_lost(self, TransferError("closing"))
            self.connection.close(TransferError("closing"))

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                connected = await _open_socket(*self.place)
        except (OSError, TimeoutError) as error:
            reason = TransferError(f"cannot connect to {self.place[0]}:{self.place[1]}: {error}")
            self._owner.loop.call_soon(self._owner.lost, self, reason)
            return
        connection = self.connection = KvConnection(connected, from_prefill, self)
        self._owner.loop.call_later(HANDSHAKE_TIMEOUT_S, self._give_up, connection)

    def _give_up(self, connection: KvConnection) -> None:
        if not self.is_ready:
            connection.close(TransferTimeout("no KvHello in time"))

    # ConnectionEvents

    def on_message(self, connection: KvConnection, message: Any) -> None:
        if self.is_ready and isinstance(message, (Challenge, KvHello, Refused)):
            raise ProtocolError(f"{type(message).__name__} after the handshake")
        if self.is_ready:
            if not isinstance(message, KvBeat):
                self._owner.apply(self._owner.core.on_message(self._owner.loop.time(), message))
        elif isinstance(message, Challenge):
            self._nonces = (message.nonce, new_nonce())
            proof = make_proof(self._owner.secret, Side.KV_CALLER, *self._nonces)
            connection.send([encode(_hello(self._owner.identity, proof, self._nonces[1]))])
        elif isinstance(message, Refused):
            kind = LayoutMismatch if message.code == LayoutMismatch.code else ProtocolError
            raise kind(message.message)
        elif isinstance(message, KvHello):
            self._on_hello(connection, message)
        else:
            raise ProtocolError(f"{type(message).__name__} before KvHello")

    def on_header(self, connection: KvConnection, header: KvBlocks) -> memoryview | None:
        if not self.is_ready:
            raise ProtocolError("KvBlocks before KvHello")
        check_header(header, self._owner.identity.layout)
        return _aligned(header.num_bytes) if self._owner.core.wants(header) else None

    def on_payload(self, connection: KvConnection, header: KvBlocks, payload: memoryview) -> None:
        owner = self._owner
        is_intact = owner.core.wants(header) and verified(header, payload, owner.identity.layout)
        owner.apply(owner.core.on_blocks(owner.loop.time(), header, is_intact), payload)

    def on_room(self, connection: KvConnection) -> None:
        pass

    def on_closed(self, connection: KvConnection, error: Exception) -> None:
        was_ready, self.is_ready = self.is_ready, False
        if (was_ready and not isinstance(error, TransferError)) or not isinstance(error, errors.BatonError):
            error = TransferError(f"connection lost: {error}")  # another prefill worker may do better
        self._owner.lost(self, error)

    def _on_hello(self, connection: KvConnection, hello: KvHello) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            raise ProtocolError(f"protocol {hello.protocol}, this worker speaks {PROTOCOL_VERSION}")
        if not proves(hello.secret_proof, self._owner.secret, Side.KV_LISTENER, *self._nonces):
            raise ProtocolError("the prefill worker does not know the secret")
        if hello.fingerprint != self._owner.identity.fingerprint:
            raise LayoutMismatch(f"fingerprint {hello.fingerprint} of {hello.worker_id} is not this worker's")
        self.is_ready = True
        connection.send([encode(message) for message in self._early])
        self._early.clear()


def _hello(identity: KvIdentity, proof: bytes, nonce: bytes) -> KvHello:
    return KvHello(PROTOCOL_VERSION, identity.worker_id, identity.incarnation, identity.fingerprint, proof, nonce)


def _beat(connection: KvConnection, now: float) -> None:
    """Say something if nothing was said lately; give up on a peer that is silent."""
    if now - connection.heard_at > SILENCE_S:
        connection.close(TransferTimeout(f"the peer said nothing for {SILENCE_S} s"))
    elif not connection.queued_bytes and now - connection.sent_at >= BEAT_S:
        connection.send([encode(KvBeat())])


async def _open_socket(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setblocking(False)
        await loop.sock_connect(opened, address)
    except BaseException:
        opened.close()
        raise
    return opened


def _aligned(num_bytes: int) -> memoryview:
    """Fresh memory: the device may go on using it, so it is never used twice."""
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes].data
