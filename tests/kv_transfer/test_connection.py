"""A connection's system calls: what wakes it, what it asks the kernel for, and when its peer is silent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from engine_core.errors import TransferTimeout
from kv_transfer import beats
from kv_transfer import connection as module
from kv_transfer.connection import KvConnection
from kv_transfer.framing import frame
from kv_transfer.wire import KvBeat, KvBlocks, encode_body, from_prefill
from tests.kv_transfer.test_transport import until

LOW_WATER_BYTES = 64 << 10
PAYLOAD = np.random.default_rng(0).integers(0, 256, 16 * LOW_WATER_BYTES, np.uint8)
HEADER = KvBlocks("r", 0, 1, 0, (0,), (1,), (0, 1), (0, 1), "bfloat16", (7,), len(PAYLOAD), None)
PIECE_BYTES = 1 << 10


class Ears:
    """ConnectionEvents."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.payloads: list[np.ndarray] = []
        self.error: Exception | None = None

    def on_message(self, connection: KvConnection, message: Any) -> None:
        self.messages.append(message)

    def on_header(self, connection: KvConnection, header: KvBlocks) -> np.ndarray:
        return np.zeros(header.num_bytes, np.uint8)

    def on_payload(self, connection: KvConnection, header: KvBlocks, payload: np.ndarray) -> None:
        self.payloads.append(payload)

    def on_room(self, connection: KvConnection) -> None:
        pass

    def on_closed(self, connection: KvConnection, error: Exception) -> None:
        self.error = error


@contextlib.asynccontextmanager
async def open_connection() -> AsyncIterator[tuple[KvConnection, socket.socket, Ears]]:
    """One over loopback, its peer's socket, which blocks, and who hears of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as peer:
        peer.connect(listener.getsockname())
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ears = Ears()
        connection = KvConnection(listener.accept()[0], from_prefill, ears)
        yield connection, peer, ears
        connection.close(ConnectionError("the test is over"))
        await asyncio.sleep(0)


def framed(message: msgspec.Struct, number: int) -> bytes:
    return frame(encode_body(message), number)


async def begin(connection: KvConnection, peer: socket.socket) -> None:
    """Of the payload only the first piece has come."""
    peer.sendall(framed(HEADER, 0) + PAYLOAD[:PIECE_BYTES].tobytes())
    await until(lambda: connection._rest == len(PAYLOAD) - PIECE_BYTES)
    peer.sendall(PAYLOAD[PIECE_BYTES : 2 * PIECE_BYTES].data)  # the first came with its header: this one is received
    await until(lambda: connection._rest == len(PAYLOAD) - 2 * PIECE_BYTES)


async def test_little_of_much_wakes_nobody_and_the_rest_does(monkeypatch):
    monkeypatch.setattr(module, "LOW_WATER_BYTES", LOW_WATER_BYTES)
    async with open_connection() as (connection, peer, ears):
        await begin(connection, peer)
        rest, at = connection._rest, 2 * PIECE_BYTES
        peer.sendall(PAYLOAD[at : at + PIECE_BYTES].data)
        await asyncio.sleep(0.05)
        assert connection._rest == rest
        peer.sendall(PAYLOAD[at + PIECE_BYTES : at + LOW_WATER_BYTES].data)
        await until(lambda: connection._rest == rest - LOW_WATER_BYTES)
        peer.sendall(PAYLOAD[at + LOW_WATER_BYTES : -1].data)
        await until(lambda: connection._rest == 1)
        peer.sendall(PAYLOAD[-1:].tobytes() + framed(KvBeat(), 1))
        await until(lambda: ears.messages)
        assert ears.payloads[0].tobytes() == PAYLOAD.tobytes()


async def test_payload_that_comes_too_slowly_to_wake_is_no_silence(monkeypatch):
    monkeypatch.setattr(module, "LOW_WATER_BYTES", LOW_WATER_BYTES)
    monkeypatch.setattr(beats, "SILENCE_S", 0.05)
    async with open_connection() as (connection, peer, ears):
        await begin(connection, peer)
        for number in range(2, 5):
            peer.sendall(PAYLOAD[number * PIECE_BYTES : (number + 1) * PIECE_BYTES].data)
            await asyncio.sleep(0.1)
            beats.look_after(connection, connection._loop.time())
            assert not connection.closed
            assert connection._rest == len(PAYLOAD) - (number + 1) * PIECE_BYTES
        await asyncio.sleep(0.1)
        beats.look_after(connection, connection._loop.time())
        await until(lambda: ears.error)
        assert isinstance(ears.error, TransferTimeout)


async def test_a_kernel_that_is_full_is_not_asked_again_before_it_has_room():
    async with open_connection() as (connection, peer, _):
        connection._socket = spied = SpiedSocket(connection._socket)
        payload = np.zeros(64 << 20, np.uint8)
        connection.send(HEADER, [payload[: len(payload) // 2].data, payload[len(payload) // 2 :].data])
        assert spied.sent == [sum(spied.sent)] and connection.queued_bytes
        received = 0
        while connection.queued_bytes:
            received += len(await asyncio.to_thread(peer.recv, 1 << 20))
        assert 0 not in spied.sent and received > len(payload) // 2


class SpiedSocket:
    """A socket that notes what each `sendmsg` has taken, 0 for one that was refused."""

    def __init__(self, spied: socket.socket) -> None:
        self._spied = spied
        self.sent: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._spied, name)

    def sendmsg(self, pieces: list[memoryview]) -> int:
        self.sent.append(0)
        self.sent[-1] = self._spied.sendmsg(pieces)
        return self.sent[-1]


@pytest.mark.parametrize("num_bytes", [1, 2 * LOW_WATER_BYTES])
async def test_a_small_payload_costs_no_further_call(monkeypatch, num_bytes):
    monkeypatch.setattr(module, "LOW_WATER_BYTES", LOW_WATER_BYTES)
    async with open_connection() as (connection, peer, ears):
        header = msgspec.structs.replace(HEADER, num_bytes=num_bytes)
        peer.sendall(framed(header, 0))
        await until(lambda: connection._rest == num_bytes)
        peer.sendall(PAYLOAD[:num_bytes].data)
        await until(lambda: ears.payloads)
        assert connection._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
        assert ears.payloads[0].tobytes() == PAYLOAD[:num_bytes].tobytes()
