"""Proof of a shared secret, for both planes: HMAC-SHA256 over both ends' nonces, each end proving its own side.

Proofs of one purpose or side are worthless for another, so none can be reflected or carried to the other port.
The connection itself is not encrypted: the secret keeps strangers out, not eavesdroppers.
"""

from __future__ import annotations

import enum
import hmac
import ipaddress
import secrets

from engine_core.errors import ConfigError

NONCE_BYTES = 16


class Side(enum.StrEnum):
    """Who proves what."""

    CONTROL_LISTENER = "baton control listener"
    CONTROL_CALLER = "baton control caller"
    HOST_LISTENER = "baton host listener"
    HOST_CALLER = "baton host caller"
    KV_LISTENER = "baton kv listener"
    KV_CALLER = "baton kv caller"


def new_nonce() -> bytes:
    """Random bytes that the other end's proof must cover."""
    return secrets.token_bytes(NONCE_BYTES)


def make_proof(secret: bytes | None, side: Side, listener_nonce: bytes, caller_nonce: bytes) -> bytes:
    """The proof of `side`; empty without a secret."""
    if secret is None:
        return b""
    return hmac.digest(secret, b"\0".join((side.encode(), listener_nonce, caller_nonce)), "sha256")


def proves(proof: bytes, secret: bytes | None, side: Side, listener_nonce: bytes, caller_nonce: bytes) -> bool:
    """Whether the other end knows our secret (without one: whether it has none either)."""
    if len(listener_nonce) != NONCE_BYTES or len(caller_nonce) != NONCE_BYTES:
        return False
    return hmac.compare_digest(proof, make_proof(secret, side, listener_nonce, caller_nonce))


def check_bind(host: str, secret: bytes | None) -> None:
    """Refuse to listen beyond this machine without a secret."""
    if secret is not None and not secret:
        raise ConfigError("the shared secret is empty")
    if secret is None and not _is_loopback(host):
        raise ConfigError(f"without a shared secret a worker listens on loopback only, not on {host!r}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
