"""Beats on an idle connection, and the end of a silent one."""

from __future__ import annotations

from engine_core.errors import TransferTimeout
from kv_transfer.connection import KvConnection
from kv_transfer.wire import KvBeat

BEAT_S = 1.0
SILENCE_S = 5.0  # a peer that said nothing for so long hangs, or is cut off


def look_after(connection: KvConnection, now: float) -> None:
    """Say something if nothing was said lately; give up on a peer that is silent."""
    if now - connection.heard_at > SILENCE_S:
        connection.read()  # payload that comes slowly has not woken us
    if now - connection.heard_at > SILENCE_S:
        connection.close(TransferTimeout(f"the peer said nothing for {SILENCE_S} s"))
    elif not connection.queued_bytes and now - connection.sent_at >= BEAT_S:
        connection.send(KvBeat())
