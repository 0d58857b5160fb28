"""How messages are cut out of a byte stream: length, check, body.

The check covers the body and, unsent, the frame's number on its connection and way: a bit that flipped, or a frame that
was lost, doubled or moved on the way, is found with the next frame that is read, and ends the connection.
"""

from __future__ import annotations

import struct

import xxhash

HEAD = struct.Struct(">II")
"""Bytes of the body, and `check_of` it."""


def check_of(body: bytes | bytearray | memoryview, number: int) -> int:
    """u32 over a body that is frame `number`, from 0, of its connection and way. Against accidents, not attackers."""
    return xxhash.xxh32_intdigest(body, number & 0xFFFFFFFF)


def frame(body: bytes | bytearray | memoryview, number: int) -> bytes:
    """A whole frame."""
    return HEAD.pack(len(body), check_of(body, number)) + body
