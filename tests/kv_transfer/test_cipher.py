"""Sealed frames: what they hide, what they notice, who may not do without them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools

import numpy as np
import pytest

from engine_core.errors import ConfigError, ProtocolError
from engine_core.messages import PeerAddress
from kv_transfer.auth import Side
from kv_transfer.cipher import TAG_BYTES, FrameCipher
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.sender import NetKvSender
from kv_transfer.wire import HOST_TRANSPORTS, Transport
from tests.kv_transfer.test_transport import (
    ALL_TRANSPORTS,
    DecodeEars,
    Pair,
    PrefillEars,
    first_token,
    open_pair,
    until,
)


def ciphers(secrets: tuple[bytes, bytes] = (b"s", b"s"), nonces: tuple[bytes, bytes] = (b"l", b"c")):
    return (
        FrameCipher(secrets[0], Side.KV_LISTENER, *nonces),
        FrameCipher(secrets[1], Side.KV_CALLER, *nonces),
    )


def test_both_ways_and_in_order():
    listener, caller = ciphers()
    sealed = [listener.seal([b"ab", memoryview(b"c")]), listener.seal([b"def"])]
    assert [len(unit) for unit in sealed] == [3 + TAG_BYTES] * 2
    assert caller.open(memoryview(sealed[0])) == b"abc"
    target = np.zeros(3, np.uint8)
    caller.open_into(memoryview(sealed[1]), target)
    assert target.tobytes() == b"def"
    assert listener.open(memoryview(caller.seal([b"up"]))) == b"up"


@pytest.mark.parametrize("harm", ["flip", "replay", "drop", "reflect", "other secret", "other connection"])
def test_what_was_not_sealed_next_is_refused(harm):
    secrets = (b"s", b"t") if harm == "other secret" else (b"s", b"s")
    listener, caller = ciphers(secrets)
    if harm == "other connection":
        _, caller = ciphers(nonces=(b"l", b"d"))
    first, second = listener.seal([b"abc"]), listener.seal([b"abc"])
    assert first != second
    if harm == "replay":
        caller.open(memoryview(first))
    unit = {"flip": bytes([first[0] ^ 1]) + first[1:], "drop": second}.get(harm, first)
    with pytest.raises(ProtocolError, match="did not seal"):
        (listener if harm == "reflect" else caller).open(memoryview(unit))


@contextlib.asynccontextmanager
async def sealed_pair(transport: Transport, encrypts: tuple[bool, bool]):
    """Prefill and decode, each wanting encryption or not."""
    async with open_pair("inproc") as pair:
        options = [dataclasses.replace(ALL_TRANSPORTS, transports=(transport,), encrypts=each) for each in encrypts]
        pair.sender = NetKvSender(pair.identity("p", "f"), b"secret", pair.prefill, 1 << 30, options[0])
        pair.receiver = NetKvReceiver(pair.identity("d", "f"), b"secret", pair.decode, options[1])
        pair.address = PeerAddress("127.0.0.1", 0, await pair.sender.start("127.0.0.1", 0))
        yield pair


async def hand_over(pair: Pair, name: str) -> None:
    pair.sender.offer(name, 0, 30)
    pair.receiver.request(pair.address, pair.ticket(name, [0, 1]))
    pair.sender.send_blocks(name, 0, [0, 1], pair.layers([0, 1]))
    pair.sender.finish(name, 0, first_token(name))
    await until(lambda: (name, 0) in pair.decode.done or (name, 0) in pair.decode.failed)


class Relay:
    """Between decode and prefill: keeps what passes, and flips a bit of it on demand."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.seen = bytearray()
        self.flip_at = -1
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._on_caller, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.01)

    async def _on_caller(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers += [writer, far_writer]
        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := bytearray(await source.read(1 << 16)):
                if 0 <= self.flip_at - len(self.seen) < len(data):
                    data[self.flip_at - len(self.seen)] ^= 4
                self.seen += data
                target.write(bytes(data))
        target.close()


@pytest.mark.parametrize("encrypts", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("transport", HOST_TRANSPORTS)
async def test_either_end_may_ask_for_it(transport, encrypts):
    async with sealed_pair(transport, encrypts) as pair:
        relay = Relay(pair.address.kv_port)
        pair.address = PeerAddress("127.0.0.1", 0, await relay.start())
        await hand_over(pair, "the-name-of-the-request")
        pair.check_blocks("the-name-of-the-request", [0, 1])
        (link,) = pair.sender.links
        assert all((connection.cipher is not None) == any(encrypts) for connection in link._connections)
        content = pair.layers([0, 1])[0].tobytes()[:32]
        assert (b"the-name-of-the-request" in relay.seen) != any(encrypts)
        if transport is Transport.TCP:
            assert (content in relay.seen) != any(encrypts)
        await pair.receiver.close()
        await pair.sender.close()
        await relay.close()


async def test_a_flipped_bit_ends_the_connection_and_the_next_request_works():
    async with sealed_pair(Transport.TCP, (True, True)) as pair:
        relay = Relay(pair.address.kv_port)
        pair.address = PeerAddress("127.0.0.1", 0, await relay.start())
        await hand_over(pair, "before")
        relay.flip_at = len(relay.seen) + 500
        await hand_over(pair, "r")
        assert pair.decode.failed["r", 0].retryable or pair.decode.done["r", 0]
        await hand_over(pair, "after")
        pair.check_blocks("after", [0, 1])
        await pair.receiver.close()
        await pair.sender.close()
        await relay.close()


async def test_planes_can():
    async with open_pair("plane tcp", encrypts=True) as pair:
        relay = Relay(pair.address.kv_port)
        pair.address = PeerAddress("127.0.0.1", 0, await relay.start())
        await hand_over(pair, "the-name-of-the-request")
        pair.check_blocks("the-name-of-the-request", [0, 1])
        assert b"the-name-of-the-request" not in relay.seen
        await pair.receiver.close()
        await relay.close()


async def test_without_a_secret_it_cannot_be():
    async with open_pair("inproc") as pair:
        options = dataclasses.replace(ALL_TRANSPORTS, encrypts=True)
        sender = NetKvSender(pair.identity("p", "f"), None, PrefillEars(), 1, options)
        with pytest.raises(ConfigError, match="secret"):
            await sender.start("127.0.0.1", 0)
        sender.stop()
        with pytest.raises(ConfigError, match="secret"):
            NetKvReceiver(pair.identity("d", "f"), None, DecodeEars(), options)
