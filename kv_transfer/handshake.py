"""The first messages on a KV connection: who is there, do both know the secret, and which transport both can do.

    prefill (listens)                       decode (calls)
    Challenge -------------------------->
              <-------------------------- KvHello, with a proof over both nonces
    KvWelcome, with a proof likewise, or Refused with the reason

Shared memory is chosen where the prefill worker can open the segment that decode probes with; who says so without
being able to is found out at the first real segment, and the two agree on another transport.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.config import TransferConfig
from engine_core.errors import (
    BatonError,
    ConfigError,
    LayoutMismatch,
    ProtocolError,
    TransferTimeout,
    WrongProtocol,
    WrongSecret,
)
from engine_core.messages import Challenge, Refused
from kv_transfer.arena import Segment, SegmentRef
from kv_transfer.auth import Side, make_proof, new_nonce, proves
from kv_transfer.cipher import FrameCipher
from kv_transfer.connection import KvConnection
from kv_transfer.endpoint import KvIdentity
from kv_transfer.wire import (
    HOST_TRANSPORTS,
    KV_PROTOCOL,
    MAX_HEADER_BYTES,
    KvBlocks,
    KvHello,
    KvWelcome,
    Transport,
    from_decode,
    from_prefill,
)

logger = logging.getLogger(__name__)

HANDSHAKE_BYTES = 4096  # of a message before the handshake is over
HANDSHAKE_TIMEOUT_S = 5.0
PROBE_BYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferOptions:
    """What one end can do, and how much memory it spends.

    Attributes:
        transports: best first.
        num_connections: of one pair over TCP.
        encrypts: seal every frame that leaves the host's memory; needs a secret.
        arena_bytes: prefill: shared memory for all decode workers together; decode: landing memory per prefill worker,
            of which a third more is set aside over TCP (see `receiver.ARENA_WINDOWS`).
        library: that takes digests, see `kv_transfer.compiled`; None: Python does.
    """

    transports: tuple[Transport, ...]
    num_connections: int
    arena_bytes: int
    encrypts: bool
    library: Path | None

    @classmethod
    def of(cls, config: TransferConfig, library: Path | None) -> TransferOptions:
        """Everything this host can do, as configured."""
        return cls(
            transports=HOST_TRANSPORTS if config.transport == "auto" else (Transport(config.transport),),
            num_connections=config.connections,
            arena_bytes=config.arena_bytes,
            encrypts=config.encrypt,
            library=library,
        )

    def check_secret(self, secret: bytes | None) -> None:
        """Refuse to encrypt without a secret."""
        if self.encrypts and secret is None:
            raise ConfigError("encryption between workers needs a shared secret")


class ListenerHandshake:
    """Prefill's end of a connection until it is welcome.

    Args:
        accepted: the connected socket.
        identity: of this worker.
        secret: shared with decode workers, or None.
        encrypts: seal frames even if the caller does not want it.
        admit: takes the connection over; gives transport, session and fabric of the answer.
        on_over: called once, with the error that the connection was ended for, or None where it was not.

    `admit` may raise a BatonError, whose reason the caller is told.
    """

    def __init__(
        self,
        accepted: socket.socket,
        identity: KvIdentity,
        secret: bytes | None,
        encrypts: bool,
        admit: Callable[[KvConnection, KvHello], tuple[Transport, bytes, str]],
        on_over: Callable[[ListenerHandshake, ProtocolError | LayoutMismatch | None], None],
    ) -> None:
        self._identity = identity
        self._secret = secret
        self._encrypts = encrypts
        self._admit = admit
        self._on_over = on_over
        self._nonce = new_nonce()
        self.connection = KvConnection(accepted, from_decode, self)
        self.connection.max_header_bytes = HANDSHAKE_BYTES
        self._timeout = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._give_up)
        self.connection.send(Challenge(self._nonce))

    # ConnectionEvents

    def on_message(self, connection: KvConnection, message: Any) -> None:
        """The hello, and nothing else."""
        if not isinstance(message, KvHello):
            raise ProtocolError(f"{type(message).__name__} before KvHello")
        try:
            self._check(message)
            transport, session, fabric = self._admit(connection, message)
        except BatonError as error:
            connection.send(Refused(error.code, str(error)))
            raise ProtocolError(str(error)) from error
        self._timeout.cancel()
        connection.max_header_bytes = MAX_HEADER_BYTES
        identity = self._identity
        proof = make_proof(self._secret, Side.KV_LISTENER, self._nonce, message.nonce)
        encrypts = self._encrypts or message.encrypts
        connection.send(
            KvWelcome(
                KV_PROTOCOL,
                identity.worker_id,
                identity.incarnation,
                identity.fingerprint,
                proof,
                transport,
                encrypts,
                session,
                fabric,
            )
        )
        if encrypts:
            assert self._secret is not None
            connection.cipher = FrameCipher(self._secret, Side.KV_LISTENER, self._nonce, message.nonce)
        self._on_over(self, None)

    def on_header(self, connection: KvConnection, header: KvBlocks) -> np.ndarray | None:
        """Never."""
        raise ProtocolError("a decode worker sent blocks")

    def on_payload(self, connection: KvConnection, header: KvBlocks, payload: np.ndarray) -> None:
        """Never."""

    def on_room(self, connection: KvConnection) -> None:
        """Nothing waits."""

    def on_closed(self, connection: KvConnection, error: Exception) -> None:
        """Refused, silent, or gone."""
        self._timeout.cancel()
        logger.warning("a KV connection ended in its handshake: %s", error)
        reason = error.__cause__ or error
        self._on_over(self, reason if isinstance(reason, (ProtocolError, LayoutMismatch)) else None)

    def _check(self, hello: KvHello) -> None:
        if hello.protocol != KV_PROTOCOL or not hello.worker_id:
            raise WrongProtocol(f"protocol {hello.protocol}, this worker speaks {KV_PROTOCOL}")
        if not proves(hello.secret_proof, self._secret, Side.KV_CALLER, self._nonce, hello.nonce):
            raise WrongSecret("wrong secret")
        if hello.encrypts and self._secret is None:
            raise ProtocolError("frames cannot be sealed without a secret")
        if hello.fingerprint != self._identity.fingerprint:
            text = f"fingerprint {hello.fingerprint} of {hello.worker_id} is not this worker's"
            raise LayoutMismatch(f"{text} {self._identity.fingerprint}")

    def _give_up(self) -> None:
        self.connection.close(ProtocolError("no KvHello in time"))


class CallerHandshake:
    """Decode's end of a connection until it is welcome.

    Args:
        connected: the connected socket.
        identity: of this worker.
        secret: shared with prefill workers, or None.
        offer: what the hello offers, see `KvHello`.
        on_welcome: takes the connection over; may raise ProtocolError.
        on_failed: told why there is no welcome.
    """

    def __init__(
        self,
        connected: socket.socket,
        identity: KvIdentity,
        secret: bytes | None,
        offer: Offer,
        on_welcome: Callable[[KvConnection, KvWelcome], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._identity = identity
        self._secret = secret
        self._offer = offer
        self._on_welcome = on_welcome
        self._on_failed = on_failed
        self._nonces = (b"", b"")
        self.connection = KvConnection(connected, from_prefill, self)
        self.connection.max_header_bytes = HANDSHAKE_BYTES
        self._timeout = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._give_up)

    # ConnectionEvents

    def on_message(self, connection: KvConnection, message: Any) -> None:
        """Challenge, then the welcome or the reason why not."""
        match message:
            case Challenge(nonce):
                self._nonces = (nonce, new_nonce())
                connection.send(self._hello())
            case Refused(code, text):
                raise (LayoutMismatch if code == LayoutMismatch.code else ProtocolError)(text)
            case KvWelcome():
                self._check(message)
                self._timeout.cancel()
                connection.max_header_bytes = MAX_HEADER_BYTES
                if message.encrypts and self._secret is not None:
                    connection.cipher = FrameCipher(self._secret, Side.KV_CALLER, *self._nonces)
                self._on_welcome(connection, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} before KvWelcome")

    def on_header(self, connection: KvConnection, header: KvBlocks) -> np.ndarray | None:
        """Not yet."""
        raise ProtocolError("KvBlocks before KvWelcome")

    def on_payload(self, connection: KvConnection, header: KvBlocks, payload: np.ndarray) -> None:
        """Never."""

    def on_room(self, connection: KvConnection) -> None:
        """Nothing waits."""

    def on_closed(self, connection: KvConnection, error: Exception) -> None:
        """Refused, silent, or gone."""
        self._timeout.cancel()
        self._on_failed(error)

    def _hello(self) -> KvHello:
        identity, offer = self._identity, self._offer
        return KvHello(
            KV_PROTOCOL,
            identity.worker_id,
            identity.incarnation,
            identity.fingerprint,
            make_proof(self._secret, Side.KV_CALLER, *self._nonces),
            self._nonces[1],
            identity.layout.wire_fields,
            offer.transports,
            offer.probe,
            offer.encrypts,
            offer.window_bytes,
            offer.session,
        )

    def _check(self, welcome: KvWelcome) -> None:
        if welcome.protocol != KV_PROTOCOL:
            raise ProtocolError(f"protocol {welcome.protocol}, this worker speaks {KV_PROTOCOL}")
        if not proves(welcome.secret_proof, self._secret, Side.KV_LISTENER, *self._nonces):
            raise ProtocolError("the prefill worker does not know the secret")
        if welcome.fingerprint != self._identity.fingerprint:
            raise LayoutMismatch(f"fingerprint {welcome.fingerprint} of {welcome.worker_id} is not this worker's")
        if welcome.encrypts != (self._offer.encrypts or (welcome.encrypts and self._secret is not None)):
            raise ProtocolError("the prefill worker does not seal frames, or wants to without a secret")
        if welcome.transport not in self._offer.transports:
            raise ProtocolError(f"transport {welcome.transport!r} was not offered")

    def _give_up(self) -> None:
        self.connection.close(TransferTimeout("no KvWelcome in time"))


@dataclass(frozen=True, slots=True)
class Offer:
    """Decode's part of the choice; the fields are those of `KvHello`."""

    transports: tuple[Transport, ...]
    probe: SegmentRef | None
    encrypts: bool
    window_bytes: int
    session: bytes


def choose(hello: KvHello, mine: tuple[Transport, ...]) -> Transport:
    """The first of decode's transports that this end can do too.

    Raises:
        ProtocolError: there is none.
    """
    for transport in hello.transports:
        if transport in mine and (transport != Transport.SHARED_MEMORY or _can_open(hello.probe)):
            return Transport(transport)
    raise ProtocolError(f"no transport in common: {', '.join(hello.transports)} against {', '.join(mine)}")


def _can_open(probe: SegmentRef | None) -> bool:
    if probe is None:
        return False
    try:
        Segment.open(probe)
    except (OSError, ProtocolError) as error:
        logger.info("no shared memory with this decode worker: %s", error)
        return False
    return True
