"""The leader's connections to the other hosts of its worker: their life and death, and the commands they get."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from engine_core.errors import BatonError, ConfigError, ProtocolError, WorkerDied, WrongProtocol, WrongSecret
from engine_core.host_commands import Begin, DeviceCommand, ExportCommand, KvPiece
from engine_core.messages import Challenge, KvShard, Message, Refused
from kv_transfer.auth import Side, check_bind, make_proof, new_nonce, proves
from kv_transfer.channel import MAX_FRAME_BYTES, Channel
from kv_transfer.handoff import error_named
from kv_transfer.host_loop import BEAT_S, SILENT_BEATS, STARTING_BEATS, HostLoop, how_it_ended
from kv_transfer.host_wire import (
    HOST_PROTOCOL,
    HostBeat,
    HostFailed,
    HostHello,
    HostReady,
    HostWelcome,
    from_follower,
)
from kv_transfer.silence import Silence

logger = logging.getLogger(__name__)

HANDSHAKE_FRAME_BYTES = 4096
HANDSHAKE_TIMEOUT_S = 5.0


class _Host:
    """One follower that has proved who it is."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.silence = Silence(STARTING_BEATS)
        self.ready: HostReady | None = None
        self.inflight_bytes = 0


class HostLinks:
    """See `engine_core.host_commands.Followers`.

    Args:
        worker_id, incarnation: of the worker; a follower of another life is refused.
        num_hosts: leader and followers.
        secret: shared by all hosts; None listens on loopback only.
        on_lost: told, on a thread of its own, why this life of the worker has ended. Its process must end then: device
            calls that wait for the lost host never return.
    """

    def __init__(
        self, worker_id: str, incarnation: int, num_hosts: int, secret: bytes | None, on_lost: Callable[[str], None]
    ) -> None:
        self.num_hosts = num_hosts
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._secret = secret
        self._on_lost = on_lost
        self._loop = HostLoop("hosts")
        self._hosts: dict[int, _Host] = {}
        self._begin: Begin | None = None
        self._changed = threading.Condition()
        self._problem: BatonError | None = None
        self._is_closing = False
        self._server: asyncio.Server | None = None
        self._beats: asyncio.Task[None] | None = None

    def listen(self, host: str, port: int) -> int:
        """Listen for followers; a port of 0 takes any free one. Returns the port."""
        check_bind(host, self._secret)
        return self._loop.call(self._listen(host, port))

    def wait_connected(self, timeout_s: float) -> None:
        """Wait until every follower has proved who it is.

        Raises:
            WorkerDied: one did not come in time, or is gone.
        """
        self._wait(lambda: len(self._hosts) == self.num_hosts - 1, timeout_s)

    @property
    def kv_shards(self) -> tuple[KvShard, ...]:
        """Where the followers hand KV over, in the order of their heads; once they are ready."""
        found = [host.ready.kv for _, host in sorted(self._hosts.items()) if host.ready and host.ready.kv]
        return tuple(sorted(found, key=lambda shard: shard.first_head))

    @property
    def inflight_bytes(self) -> int:
        """KV of all followers that decode workers have not collected yet, a beat ago."""
        return sum(host.inflight_bytes for host in self._hosts.values())

    def close(self) -> None:
        """Hang up: the followers end, too."""
        self._is_closing = True
        self._loop.close(self._close)

    # Followers

    def begin(self, begin: Begin) -> None:
        """See Followers."""
        self._loop.post(self._send, begin)

    def wait_ready(self) -> None:
        """See Followers."""
        self._wait(lambda: all(host.ready for host in self._hosts.values()), None)
        for host in self._hosts.values():
            host.silence.limit = SILENT_BEATS

    def send(self, command: DeviceCommand | ExportCommand) -> None:
        """See Followers."""
        self._loop.post(self._send, command)

    def send_each(self, commands: list[KvPiece]) -> None:
        """See Followers."""
        self._loop.call(self._send_each(commands))

    def _wait(self, condition: Callable[[], bool], timeout_s: float | None) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: condition() or self._problem is not None, timeout_s):
                missing = sorted(set(range(1, self.num_hosts)) - set(self._hosts))
                raise WorkerDied(f"hosts {missing} of {self._worker_id} did not connect within {timeout_s:g} s")
        if self._problem is not None:
            raise self._problem

    # On the thread of the loop

    def _send(self, message: Message) -> None:
        for host in self._hosts.values():
            host.channel.send(message)

    async def _send_each(self, commands: list[KvPiece]) -> None:
        for number, command in enumerate(commands, start=1):
            channel = self._hosts[number].channel
            channel.send(command)
            await channel.drained()

    async def _listen(self, host: str, port: int) -> int:
        try:
            self._server = await self._loop.loop.create_server(self._accept, host, port)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port} for the other hosts of a worker: {error}") from error
        self._beats = self._loop.loop.create_task(self._beat())
        return int(self._server.sockets[0].getsockname()[1])

    def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for host in self._hosts.values():
            host.channel.close()

    def _accept(self) -> Channel:
        nonce = new_nonce()

        def on_open(channel: Channel) -> None:
            channel.max_frame_bytes = HANDSHAKE_FRAME_BYTES
            channel.send(Challenge(nonce))
            self._loop.loop.call_later(HANDSHAKE_TIMEOUT_S, give_up, channel)

        def give_up(channel: Channel) -> None:
            if not channel.closed and all(host.channel is not channel for host in self._hosts.values()):
                channel.abort(ProtocolError("no HostHello in time"))

        return Channel(
            from_follower, on_open, lambda channel, hello: self._welcome(channel, nonce, hello), self._on_closed
        )

    def _welcome(self, channel: Channel, nonce: bytes, message: Any) -> None:
        if not isinstance(message, HostHello):
            raise ProtocolError(f"{type(message).__name__} before HostHello")
        refusal = self._refusal(message, nonce)
        if refusal is not None:
            logger.warning("refused a host at %s: %s", channel.peername, refusal)
            channel.send(Refused(refusal.code, str(refusal)))
            channel.close()
            return
        host = _Host(channel)
        channel.max_frame_bytes = MAX_FRAME_BYTES
        channel.on_message = lambda _, answer: self._on_message(host, answer)
        channel.send(HostWelcome(make_proof(self._secret, Side.HOST_LISTENER, nonce, message.nonce)))
        with self._changed:
            self._hosts[message.number] = host
            self._changed.notify_all()

    def _refusal(self, hello: HostHello, nonce: bytes) -> ProtocolError | None:
        if hello.protocol != HOST_PROTOCOL:
            return WrongProtocol(f"protocol {hello.protocol}, this host speaks {HOST_PROTOCOL}")
        if not proves(hello.secret_proof, self._secret, Side.HOST_CALLER, nonce, hello.nonce):
            return WrongSecret("wrong secret")
        if (hello.worker_id, hello.incarnation) != (self._worker_id, self._incarnation):
            return ProtocolError(f"this is {self._worker_id}, incarnation {self._incarnation}")
        if not 0 < hello.number < self.num_hosts or hello.number in self._hosts:
            return ProtocolError(f"host {hello.number} is not expected")
        return None

    def _on_message(self, host: _Host, message: Any) -> None:
        host.silence.heard()
        match message:
            case HostBeat(inflight_bytes):
                host.inflight_bytes = inflight_bytes
            case HostReady() if host.ready is None:
                with self._changed:
                    host.ready = message
                    self._changed.notify_all()
            case HostFailed(code, text):
                error = error_named(code, text, False)
                self._lose(host, error if isinstance(error, ConfigError) else WorkerDied(text))
            case _:
                raise ProtocolError(f"{type(message).__name__} from a follower")

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._send(HostBeat(0))
            for host in list(self._hosts.values()):
                if host.silence.is_over():
                    host.channel.abort(ProtocolError(f"silent for {host.silence.limit * BEAT_S:g} s"))

    def _on_closed(self, channel: Channel, error: Exception | None) -> None:
        for host in self._hosts.values():
            if host.channel is channel:
                self._lose(host, WorkerDied(how_it_ended(error)))
                return

    def _lose(self, host: _Host, error: BatonError) -> None:
        if self._is_closing or self._problem is not None:
            return
        number = next(number for number, other in self._hosts.items() if other is host)
        reason = f"host {number} of {self._worker_id} is lost: {error}"
        with self._changed:
            self._problem = type(error)(reason)
            is_serving = all(host.ready for host in self._hosts.values()) and len(self._hosts) == self.num_hosts - 1
            self._changed.notify_all()
        logger.error("%s", reason)
        if is_serving or not isinstance(error, ConfigError):
            threading.Thread(target=self._on_lost, args=(reason,), name="host lost", daemon=True).start()
