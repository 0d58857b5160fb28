"""AES-256-GCM over the frames of one KV connection (NIST SP 800-38D).

Each direction has a key of its own, made from the shared secret and both ends' nonces of this very connection, and
counts its units: the counter is the GCM nonce, so a unit that is replayed, dropped or moved fails like a forged one.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from engine_core.errors import ProtocolError
from kv_transfer.auth import Side

TAG_BYTES = 16
_NONCE_BYTES = 12


class FrameCipher:
    """Seals what one end sends and opens what it receives.

    Args:
        secret: shared by the workers.
        side: of this end.
        listener_nonce, caller_nonce: of the handshake.
    """

    def __init__(self, secret: bytes, side: Side, listener_nonce: bytes, caller_nonce: bytes) -> None:
        other = Side.KV_CALLER if side is Side.KV_LISTENER else Side.KV_LISTENER
        self._sealer, self._opener = (
            AESGCM(
                hmac.digest(
                    secret, b"\0".join((b"baton kv cipher", each.encode(), listener_nonce, caller_nonce)), "sha256"
                )
            )
            for each in (side, other)
        )
        self._num_sealed = self._num_opened = 0

    def seal(self, pieces: Sequence[bytes | memoryview]) -> bytes:
        """The pieces as one unit, `TAG_BYTES` longer."""
        nonce = self._num_sealed.to_bytes(_NONCE_BYTES, "big")
        self._num_sealed += 1
        return self._sealer.encrypt(nonce, pieces[0] if len(pieces) == 1 else b"".join(pieces), None)

    def open(self, sealed: memoryview) -> bytes:
        """A unit's content.

        Raises:
            ProtocolError: it is not what the other end sealed as its next unit.
        """
        nonce = self._next_nonce()
        try:
            return self._opener.decrypt(nonce, sealed, None)
        except InvalidTag:
            raise ProtocolError("a frame that the other end did not seal") from None

    def open_into(self, sealed: memoryview, target: np.ndarray) -> None:
        """The same, into `[len(sealed) - TAG_BYTES]` u8.

        Raises:
            ProtocolError: see `open`; the target's content is unspecified then.
        """
        nonce = self._next_nonce()
        try:
            self._opener.decrypt_into(nonce, sealed, None, target.data)
        except InvalidTag:
            raise ProtocolError("a payload that the other end did not seal") from None

    def _next_nonce(self) -> bytes:
        nonce = self._num_opened.to_bytes(_NONCE_BYTES, "big")
        self._num_opened += 1
        return nonce
