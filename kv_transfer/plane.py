"""KvSender and KvReceiver whose work is done in a data-plane process beside the worker.

A receiving thread in a busy Python process moves a third of what it could and slows the engine; here the worker only
copies blocks into memory that the plane maps (prefill), or reads them where the plane or the peer put them (decode).
"""

from __future__ import annotations

import sys

from kv_transfer.base import ReceiverEvents, SenderEvents
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.plane_link import PlaneProcess
from kv_transfer.plane_receiver import PlaneKvReceiver
from kv_transfer.plane_sender import PlaneKvSender
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.sender import NetKvSender


def open_sender(
    identity: KvIdentity,
    secret: bytes | None,
    events: SenderEvents,
    options: TransferOptions,
    process: PlaneProcess | None = None,
) -> PlaneKvSender | NetKvSender:
    """A worker's sender: with a data plane where processes can share memory; in `process`, or one of its own."""
    if sys.platform == "linux":
        return PlaneKvSender(identity, secret, events, options, process)
    return NetKvSender(identity, secret, events, options.arena_bytes, options)


def open_receiver(
    identity: KvIdentity,
    secret: bytes | None,
    events: ReceiverEvents,
    options: TransferOptions,
    process: PlaneProcess | None = None,
) -> PlaneKvReceiver | NetKvReceiver:
    """What talks to the hosts of those who hand over, likewise."""
    if sys.platform == "linux":
        return PlaneKvReceiver(identity, secret, events, options, process)
    return NetKvReceiver(identity, secret, events, options)
