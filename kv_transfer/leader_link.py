"""A follower's connection to the leader of its worker."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from engine_core.engine_thread import EngineThread
from engine_core.errors import BatonError, ProtocolError, WorkerDied
from engine_core.host_commands import Begin
from engine_core.messages import Challenge, KvShard, Message, Refused
from kv_transfer.auth import Side, make_proof, new_nonce, proves
from kv_transfer.channel import MAX_FRAME_BYTES, Channel
from kv_transfer.host_loop import BEAT_S, SILENT_BEATS, STARTING_BEATS, HostLoop, how_it_ended
from kv_transfer.host_wire import (
    HOST_PROTOCOL,
    HostBeat,
    HostFailed,
    HostHello,
    HostReady,
    HostWelcome,
    from_leader,
)
from kv_transfer.silence import Silence

logger = logging.getLogger(__name__)

RETRY_S = 0.1
STOP_TIMEOUT_S = 5.0
POLL_S = 0.001  # while copies are on their way off the device


class Executor(Protocol):
    """`engine_core.follower.Follower` (that module imports jax, this package never does)."""

    def run(self, command: Any) -> None:
        """Do what the leader does; ProtocolError where it cannot have said that."""

    def tick(self) -> bool:
        """Hand over what has reached the host; whether more is on its way."""


class LeaderLink:
    """The connection, on a thread of its own.

    Args:
        worker_id, incarnation, number: which host this is.
        secret: shared by all hosts of the worker.
        on_lost: told, on a thread of its own, why this host must end.
    """

    def __init__(
        self, worker_id: str, incarnation: int, number: int, secret: bytes | None, on_lost: Callable[[str], None]
    ) -> None:
        self.number = number
        self.inflight_bytes: Callable[[], int] = lambda: 0
        self.life = (worker_id, incarnation)
        self.secret = secret
        self._on_lost = on_lost
        self._loop = HostLoop("leader")
        self._silence = Silence(STARTING_BEATS)
        self._begun = threading.Event()
        self._welcome = threading.Event()
        self._begin: Begin | None = None
        self._problem: BatonError | None = None
        self._is_over = False
        self._executor: Executor | None = None
        self._thread = EngineThread(self._tick, self._on_crash)
        self._channel: Channel | None = None
        self._beats: asyncio.Task[None] | None = None

    def connect(self, host: str, port: int, timeout_s: float) -> None:
        """Connect, trying again until the time is over, and prove who this is.

        Raises:
            WorkerDied: nobody answers there.
            ProtocolError: the leader refuses this host, or does not know the secret.
        """
        until = time.monotonic() + timeout_s
        while True:
            try:
                self._loop.call(self._connect(host, port))
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise WorkerDied(f"no leader answers at {host}:{port}: {error}") from None
                time.sleep(RETRY_S)
        self._welcome.wait(max(RETRY_S, until - time.monotonic()))
        if self._problem is not None:
            raise self._problem

    def wait_begin(self) -> Begin:
        """Wait until the leader knows its sizes.

        Raises:
            WorkerDied: it is gone.
        """
        self._begun.wait()
        if self._begin is None:
            raise self._problem or WorkerDied("the leader is gone")
        return self._begin

    def serve(self, executor: Executor, kv: KvShard | None) -> None:
        """The checkpoint is loaded: say so, and do from now on what comes."""
        self._executor = executor
        self._silence.limit = SILENT_BEATS
        self._thread.start()
        self._loop.post(self._send, HostReady(kv))

    def fail(self, error: BatonError) -> None:
        """This host can never be ready: tell the leader, who ends it."""
        self._loop.post(self._send, HostFailed(error.code, str(error)))

    @property
    def healthy(self) -> bool:
        """Whether the leader is there and its commands are run."""
        return not self._is_over and (self._executor is None or self._thread.alive)

    def close(self) -> None:
        """Hang up: the leader ends, too."""
        self._is_over = True
        self._loop.close(lambda: self._channel.close() if self._channel is not None else None)
        if self._executor is not None and self._thread.alive:
            self._thread.stop(STOP_TIMEOUT_S)

    def _tick(self) -> bool:
        """On the engine thread."""
        assert self._executor is not None
        busy = self._executor.tick()
        if busy:
            time.sleep(POLL_S)
        return busy

    def _on_crash(self, error: BaseException) -> None:
        self._loop.post(self._lose, f"a command of the leader failed: {type(error).__name__}: {error}")

    # On the thread of the loop

    async def _connect(self, host: str, port: int) -> None:
        make = lambda: Channel(from_leader, lambda channel: None, self._on_challenge, self._on_closed)  # noqa: E731
        _, self._channel = await self._loop.loop.create_connection(make, host, port)

    def _send(self, message: Message) -> None:
        assert self._channel is not None
        self._channel.send(message)

    def _on_challenge(self, channel: Channel, message: Any) -> None:
        if not isinstance(message, Challenge):
            raise ProtocolError(f"{type(message).__name__} before Challenge")
        nonce = new_nonce()
        proof = make_proof(self.secret, Side.HOST_CALLER, message.nonce, nonce)
        channel.on_message = lambda _, answer: self._on_welcome(channel, answer, message.nonce, nonce)
        channel.send(HostHello(HOST_PROTOCOL, *self.life, self.number, proof, nonce))

    def _on_welcome(self, channel: Channel, message: Any, listener_nonce: bytes, caller_nonce: bytes) -> None:
        if isinstance(message, Refused):
            raise ProtocolError(f"refused by the leader: {message.message}")
        if not isinstance(message, HostWelcome):
            raise ProtocolError(f"{type(message).__name__} before HostWelcome")
        if not proves(message.secret_proof, self.secret, Side.HOST_LISTENER, listener_nonce, caller_nonce):
            raise ProtocolError("the leader does not know the secret")
        channel.max_frame_bytes = MAX_FRAME_BYTES
        channel.on_message = self._on_message
        self._beats = self._loop.loop.create_task(self._beat(channel))
        self._welcome.set()

    def _on_message(self, channel: Channel, message: Any) -> None:
        self._silence.heard()
        match message:
            case HostBeat():
                pass
            case Begin() if self._begin is None:
                self._begin = message
                self._begun.set()
            case Challenge() | Refused() | HostWelcome() | Begin():
                raise ProtocolError(f"{type(message).__name__} after the handshake")
            case _ if self._executor is None:
                raise ProtocolError(f"{type(message).__name__} before HostReady")
            case _:
                executor = self._executor
                self._thread.post(lambda: executor.run(message))

    async def _beat(self, channel: Channel) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            channel.send(HostBeat(self.inflight_bytes()))
            if self._silence.is_over():
                channel.abort(ProtocolError(f"silent for {self._silence.limit * BEAT_S:g} s"))

    def _on_closed(self, channel: Channel, error: Exception | None) -> None:
        if isinstance(error, BatonError) and not self._welcome.is_set():
            self._problem = error
        self._lose(f"the leader is lost: {how_it_ended(error)}")

    def _lose(self, reason: str) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._problem = self._problem or WorkerDied(reason)
        was_welcome = self._welcome.is_set()
        self._welcome.set()
        self._begun.set()
        if was_welcome:
            logger.error("%s", reason)
            threading.Thread(target=self._on_lost, args=(reason,), name="leader lost", daemon=True).start()
