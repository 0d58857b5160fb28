"""Gateway <-> worker: a worker's `ControlServer`, and a gateway's `ControlClient` for each worker.

Handshake: Challenge from the worker, Hello from the gateway, Hello with `WorkerInfo` (or Refused) from the worker.
Everything here runs on the event-loop thread; another thread goes through `loop.call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections import Counter
from typing import Any, Protocol

import msgspec

from engine_core.errors import BatonError, ConfigError, ProtocolError, WorkerDied, WrongProtocol, WrongSecret
from engine_core.messages import (
    PROTOCOL_VERSION,
    Beat,
    BlockEvents,
    BlockSnapshot,
    Cancel,
    Challenge,
    Decode,
    Donate,
    Failed,
    Hello,
    Load,
    Measured,
    Message,
    PeerAddress,
    Prefill,
    Refused,
    SnapshotRequest,
    Tokens,
    WorkerInfo,
    WorkerStats,
)
from kv_transfer.auth import Side, check_bind, make_proof, new_nonce, proves
from kv_transfer.channel import MAX_FRAME_BYTES, Channel, from_gateway, from_worker
from kv_transfer.silence import Silence

logger = logging.getLogger(__name__)

HANDSHAKE_FRAME_BYTES = 4096  # until a peer has proved the secret
HANDSHAKE_TIMEOUT_S = 5.0
SILENT_BEATS = 20  # of a worker's without an answer, about 5 s: that gateway hangs, or is cut off
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0


class GatewayEvents(Protocol):
    """What a worker hears from its gateways."""

    def on_request(self, link: GatewayLink, message: Prefill | Decode | Donate | Cancel | SnapshotRequest) -> None:
        """Work for this worker, or a question; answers go to `link`. May raise ProtocolError, which ends the link."""
        ...

    def on_gateway_lost(self, link: GatewayLink) -> None:
        """The gateway is gone: what it asked for is no longer wanted."""
        ...


class GatewayLink:
    """A worker's connection to one gateway, past the handshake."""

    def __init__(self, channel: Channel, peer: str) -> None:
        self.peer = peer
        self._channel = channel
        self._is_asked = False  # for a sign of life
        self._silence = Silence(SILENT_BEATS)

    def send(self, message: Tokens | Failed | Measured | WorkerStats | BlockEvents | BlockSnapshot) -> bool:
        """Queue a message; False when the gateway is slow or gone."""
        return self._channel.send(message)

    def ask(self, load: Load) -> None:
        """Tell it the load; a gateway that lives answers."""
        self._channel.send(load)
        self._is_asked = True

    def heard(self) -> None:
        """It said something."""
        self._is_asked = False
        self._silence.heard()

    def hang_up_if_silent(self) -> None:
        """To be called at each beat."""
        if self._is_asked and self._silence.is_over() and not self.closed:
            logger.warning("hung up on gateway %s: it has answered none of %d beats", self.peer, SILENT_BEATS)
            self._channel.abort(TimeoutError("no answer to beats"))

    @property
    def closed(self) -> bool:
        """Whether the gateway is gone."""
        return self._channel.closed

    @property
    def pending_bytes(self) -> int:
        """Bytes queued for a gateway that does not read fast enough."""
        return self._channel.pending_bytes


class ControlServer:
    """A worker's ear for gateways.

    Attributes:
        refused: connections that were ended for what they said, by the error's code.
    """

    def __init__(self, secret: bytes | None, events: GatewayEvents) -> None:
        self.links: set[GatewayLink] = set()
        self.refused: Counter[str] = Counter()
        self._secret = secret
        self._events = events
        self._channels: set[Channel] = set()
        self._last_load: Load | None = None
        self._server: asyncio.Server
        self._info: WorkerInfo

    async def start(self, host: str, info: WorkerInfo) -> WorkerInfo:
        """Listen on `host` at `info.address.port`, 0 for any free one.

        Returns:
            `info` with the real port: what every gateway is told.
        """
        check_bind(host, self._secret)
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._accept, host, info.address.port, start_serving=False
            )
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{info.address.port}: {error}") from error
        port = self._server.sockets[0].getsockname()[1]
        self._info = msgspec.structs.replace(info, address=msgspec.structs.replace(info.address, port=port))
        await self._server.start_serving()
        return self._info

    def broadcast(self, load: Load) -> None:
        """Tell all gateways; one that comes later hears the latest at once."""
        self._last_load = load
        for link in self.links:
            link.ask(load)

    def watch(self) -> None:
        """To be called at each beat: hang up on gateways that answer none. `on_gateway_lost` follows for each."""
        for link in list(self.links):
            link.hang_up_if_silent()

    def tell(self, stats: WorkerStats) -> None:
        """Tell all gateways; one that comes later hears the next."""
        for link in self.links:
            link.send(stats)

    async def close(self) -> None:
        """Stop listening; send what is queued, then hang up. `on_gateway_lost` follows for each link."""
        self._server.close()
        for channel in list(self._channels):
            channel.close()
        await asyncio.sleep(0)

    def _accept(self) -> Channel:
        nonce = new_nonce()

        def on_open(channel: Channel) -> None:
            self._channels.add(channel)
            channel.max_frame_bytes = HANDSHAKE_FRAME_BYTES
            channel.send(Challenge(nonce))
            asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._give_up_on, channel)

        def on_first(channel: Channel, message: Any) -> None:
            self._welcome(channel, nonce, message)

        return Channel(from_gateway, on_open, on_first, self._on_closed)

    def _welcome(self, channel: Channel, nonce: bytes, message: Any) -> None:
        if not isinstance(message, Hello):
            raise ProtocolError(f"{type(message).__name__} before Hello")
        problem = self._problem(message, nonce)
        if problem is not None:
            self.refused[problem.code] += 1
            logger.warning("refused gateway %s: %s", channel.peername, problem)
            channel.send(Refused(problem.code, str(problem)))
            channel.close()
            return
        link = GatewayLink(channel, message.peer)
        proof = make_proof(self._secret, Side.CONTROL_LISTENER, nonce, message.nonce)
        channel.send(Hello(PROTOCOL_VERSION, self._info.worker_id, self._info, proof))
        if self._last_load:
            link.ask(self._last_load)
        channel.max_frame_bytes = MAX_FRAME_BYTES
        channel.on_message = lambda _, request: self._on_request(link, request)
        self.links.add(link)

    def _problem(self, hello: Hello, nonce: bytes) -> ProtocolError | None:
        if hello.protocol != PROTOCOL_VERSION:
            return WrongProtocol(f"protocol {hello.protocol}, this worker speaks {PROTOCOL_VERSION}")
        if not proves(hello.secret_proof, self._secret, Side.CONTROL_CALLER, nonce, hello.nonce):
            return WrongSecret("wrong secret")
        return None

    def _on_request(self, link: GatewayLink, message: Any) -> None:
        if isinstance(message, Hello):
            raise ProtocolError("a second Hello")
        link.heard()
        if isinstance(message, Beat):
            return
        self._events.on_request(link, message)

    def _on_closed(self, channel: Channel, error: Exception | None) -> None:
        self._channels.discard(channel)
        if isinstance(error, ProtocolError):
            self.refused[error.code] += 1
            logger.warning("hung up on gateway %s: %s", channel.peername, error)
        elif error:
            logger.info("gateway connection ended: %s", error)
        for link in [link for link in self.links if link._channel is channel]:
            self.links.discard(link)
            self._events.on_gateway_lost(link)

    def _give_up_on(self, channel: Channel) -> None:
        if channel in self._channels and all(link._channel is not channel for link in self.links):
            channel.abort(ProtocolError("no Hello in time"))


class WorkerEvents(Protocol):
    """What a gateway hears from one worker."""

    def on_connected(self, client: ControlClient, info: WorkerInfo) -> None:
        """The worker said who it is; after a loss it may be another incarnation."""
        ...

    def on_tokens(self, client: ControlClient, message: Tokens) -> None:
        """New tokens of this gateway's requests."""
        ...

    def on_failed(self, client: ControlClient, message: Failed) -> None:
        """A request ended without an answer."""
        ...

    def on_load(self, client: ControlClient, message: Load) -> None:
        """The progress beat."""
        ...

    def on_measured(self, client: ControlClient, message: Measured) -> None:
        """How long some steps took."""
        ...

    def on_blocks(self, client: ControlClient, message: BlockEvents | BlockSnapshot) -> None:
        """What its prefix cache holds."""
        ...

    def on_stats(self, client: ControlClient, message: WorkerStats) -> None:
        """What it has counted."""
        ...

    def on_lost(self, client: ControlClient, error: BatonError) -> None:
        """All that was asked of the worker is lost; the client keeps reconnecting."""
        ...


class ControlClient:
    """A gateway's long-lived connection to one worker; reconnects with backoff until closed.

    Attributes:
        info: what the worker said of itself; None while not connected.
        heard_at: `loop.time()` of its last message, for suspecting a worker that hangs.
        error: why the last attempt failed or the last connection ended.
    """

    def __init__(self, address: PeerAddress, peer: str, secret: bytes | None, events: WorkerEvents) -> None:
        self.address = address
        self.info: WorkerInfo | None = None
        self.heard_at = 0.0
        self.error: BatonError | None = None
        self._peer = peer
        self._secret = secret
        self._events = events
        self._channel: Channel | None = None
        self._connected = asyncio.Event()
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.get_running_loop().create_task(self._keep_connected())

    async def wait_connected(self) -> WorkerInfo:
        """Wait for the worker's Hello."""
        while self.info is None:
            await self._connected.wait()
        return self.info

    def send(self, message: Prefill | Decode | Donate | Cancel | SnapshotRequest) -> bool:
        """Queue a message.

        Returns:
            False when the worker reads too slowly.

        Raises:
            WorkerDied: not connected.
        """
        if self.info is None or self._channel is None:
            raise WorkerDied(f"no connection to {self.address.host}:{self.address.port}")
        return self._channel.send(message)

    async def close(self) -> None:
        """Hang up for good; `on_lost` does not follow."""
        task, self._task = self._task, None
        if task:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.info = None
        if self._channel and not self._channel.closed:
            self._channel.close()
            await self._ended.wait()

    async def _keep_connected(self) -> None:
        delay_s = BACKOFF_FIRST_S
        while True:
            self._ended.clear()
            channel = Channel(from_worker, self._on_open, self._on_challenge, self._on_closed)
            try:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    await asyncio.get_running_loop().create_connection(
                        lambda channel=channel: channel,  # type: ignore[misc]
                        self.address.host,
                        self.address.port,
                        family=socket.AF_UNSPEC,
                    )
            except (OSError, TimeoutError) as error:
                self.error = WorkerDied(f"cannot connect to {self.address.host}:{self.address.port}: {error}")
            else:
                delay_s = BACKOFF_FIRST_S if await self._until_ended(channel) else delay_s
            await asyncio.sleep(delay_s * random.uniform(0.5, 1))
            delay_s = min(2 * delay_s, BACKOFF_MAX_S)

    async def _until_ended(self, channel: Channel) -> bool:
        """Returns whether the handshake had succeeded."""
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await self._connected_or_ended()
        except TimeoutError:
            channel.abort(ProtocolError("no Hello in time"))
        succeeded = self.info is not None
        await self._ended.wait()
        return succeeded

    async def _connected_or_ended(self) -> None:
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._connected, self._ended)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    def _on_open(self, channel: Channel) -> None:
        self._channel = channel

    def _on_challenge(self, channel: Channel, message: Any) -> None:
        if not isinstance(message, Challenge):
            raise ProtocolError(f"{type(message).__name__} before Challenge")
        nonce = new_nonce()
        proof = make_proof(self._secret, Side.CONTROL_CALLER, message.nonce, nonce)
        channel.on_message = lambda _, answer: self._on_hello(channel, answer, message.nonce, nonce)
        channel.send(Hello(PROTOCOL_VERSION, self._peer, None, proof, nonce))

    def _on_hello(self, channel: Channel, message: Any, listener_nonce: bytes, caller_nonce: bytes) -> None:
        if isinstance(message, Refused):
            raise ProtocolError(f"refused by {channel.peername}: {message.message}")
        if not isinstance(message, Hello) or message.info is None or message.protocol != PROTOCOL_VERSION:
            raise ProtocolError(f"unexpected {type(message).__name__} in the handshake")
        if not proves(message.secret_proof, self._secret, Side.CONTROL_LISTENER, listener_nonce, caller_nonce):
            raise ProtocolError("the worker does not know the secret")
        channel.on_message = self._on_message
        self.info = message.info
        self.error = None
        self.heard_at = asyncio.get_running_loop().time()
        self._connected.set()
        self._events.on_connected(self, message.info)

    def _on_message(self, channel: Channel, message: Any) -> None:
        self.heard_at = channel.time()
        kind: type[Message] = type(message)
        if kind is Tokens:
            self._events.on_tokens(self, message)
        elif kind is Load:
            channel.send(Beat())
            self._events.on_load(self, message)
        elif kind is Failed:
            self._events.on_failed(self, message)
        elif kind is BlockEvents or kind is BlockSnapshot:
            self._events.on_blocks(self, message)
        elif kind is Measured:
            self._events.on_measured(self, message)
        elif kind is WorkerStats:
            self._events.on_stats(self, message)
        else:
            raise ProtocolError(f"unexpected {kind.__name__}")

    def _on_closed(self, channel: Channel, error: Exception | None) -> None:
        was_connected, self.info = self.info is not None, None
        self._connected.clear()
        self._ended.set()
        lost = WorkerDied(f"connection lost: {error or 'closed'}")
        self.error = error if isinstance(error, BatonError) else lost
        if self._task is not None and was_connected:
            self._events.on_lost(self, lost)  # retryable, whatever ended it
        elif self._task is not None:
            logger.warning("worker %s:%s: %s", self.address.host, self.address.port, self.error)
