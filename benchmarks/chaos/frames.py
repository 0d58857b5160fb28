"""Cut a connection's bytes into what its ends take for one piece, so that pieces can be lost, doubled or swapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from kv_transfer.channel import MALFORMED
from kv_transfer.framing import HEAD


class Cutter(Protocol):
    """Of one way of one connection."""

    def feed(self, data: bytes) -> list[bytes]:
        """Take what arrived; return the pieces that are whole now, in order."""


class Uncut:
    """Whatever arrives together is a piece."""

    def feed(self, data: bytes) -> list[bytes]:
        """See Cutter."""
        return [data]


class Frames:
    """Frames of `kv_transfer.framing`.

    Args:
        payload_of: bytes that follow a frame with this body and belong to it.
    """

    def __init__(self, payload_of: Callable[[bytes], int] = lambda body: 0) -> None:
        self._payload_of = payload_of
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """See Cutter."""
        self._rest += data
        whole = []
        while (end := self._end()) and end <= len(self._rest):
            whole.append(self._rest[:end])
            self._rest = self._rest[end:]
        return whole

    def _end(self) -> int:
        """Of the first frame and its payload; 0 while that cannot be told."""
        if len(self._rest) < HEAD.size:
            return 0
        end: int = HEAD.size + HEAD.unpack_from(self._rest)[0]
        return end + self._payload_of(self._rest[HEAD.size : end]) if end <= len(self._rest) else 0


def kv_payload(body: bytes) -> int:
    """Bytes of payload that follow a message between KV ends in the clear."""
    try:
        fields: Any = msgspec.msgpack.decode(body)
    except MALFORMED:
        return 0
    is_blocks = isinstance(fields, list) and fields[:1] == ["KvBlocks"] and fields[-2:] == [None, 0]
    return int(fields[-3]) if is_blocks else 0


def control_frames() -> Cutter:
    """Of a connection between gateway and worker."""
    return Frames()


def kv_frames() -> Cutter:
    """Of a connection between workers whose frames are not sealed."""
    return Frames(kv_payload)
