"""Channel: typed messages over one TCP connection."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.errors import ProtocolError
from engine_core.messages import Cancel, Failed, TokenChunk, Tokens
from kv_transfer import channel as channel_module
from kv_transfer.channel import Channel, from_gateway, from_worker
from kv_transfer.framing import frame

LOOPS = pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uv"])


class End:
    """One end of a connection that records what it sees."""

    def __init__(self, decoder: Any):
        self.messages: list[Any] = []
        self.opened = asyncio.Event()
        self.closed = asyncio.Event()
        self.error: Exception | None = None
        self.channel = Channel(decoder, lambda _: self.opened.set(), self.on_message, self.on_closed)

    def on_message(self, channel: Channel, message: Any) -> None:
        self.messages.append(message)

    def on_closed(self, channel: Channel, error: Exception | None) -> None:
        assert not self.closed.is_set()
        self.error = error
        self.closed.set()


class Wire:
    """A listening worker and whoever connects to it."""

    def __init__(self) -> None:
        self.ends: list[End] = []
        self.clients: list[End] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.port = 0

    def accept(self) -> Channel:
        self.ends.append(End(from_gateway))
        return self.ends[-1].channel

    async def connect(self) -> End:
        client = End(from_worker)
        await asyncio.get_running_loop().create_connection(lambda: client.channel, "127.0.0.1", self.port)
        self.clients.append(client)
        return client

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer


@asynccontextmanager
async def open_wire() -> AsyncIterator[Wire]:
    wire = Wire()
    server = await asyncio.get_running_loop().create_server(wire.accept, "127.0.0.1", 0)
    wire.port = server.sockets[0].getsockname()[1]
    try:
        yield wire
    finally:
        server.close()
        for end in wire.clients + wire.ends:
            await asyncio.wait_for(end.opened.wait(), 10)
            end.channel.abort(ProtocolError("test over"))
            await asyncio.wait_for(end.closed.wait(), 10)
        for writer in wire.writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    with suppress(ConnectionResetError):
        return await asyncio.wait_for(reader.read(), 10)
    return b""


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def tokens(i: int) -> Tokens:
    return Tokens([TokenChunk(f"{i:032x}", 0, i, [i, i + 1])])


def run(loop_factory: Any, coroutine: Any) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(coroutine)


@LOOPS
def test_messages_arrive_whole_and_in_order(loop_factory):
    async def scenario():
        async with open_wire() as wire:
            client = await wire.connect()
            sizes = random.Random(1).choices([0, 1, 300, 70_000, 3_000_000], k=60)
            sent = [Failed("x" * size, i, "c", "m", False) for i, size in enumerate(sizes)]
            await until(lambda: wire.ends and wire.ends[0].opened.is_set())
            for i, message in enumerate(sent):
                wire.ends[0].channel.send(message)
                if i % 7 == 0:
                    await asyncio.sleep(0)
            client.channel.send(Cancel("r", 3))
            await until(lambda: len(client.messages) == len(sent) and wire.ends[0].messages)
            assert client.messages == sent
            assert wire.ends[0].messages == [Cancel("r", 3)]
            wire.ends[0].channel.send(tokens(5))
            wire.ends[0].channel.close()
            await client.closed.wait()
            assert client.messages[-1] == tokens(5), "close() sends what is queued"
            assert client.error is None
            assert client.channel.send(Cancel("r", 3)) is False

    run(loop_factory, scenario())


async def test_bytes_may_arrive_one_at_a_time():
    async with open_wire() as wire:
        _, writer = await wire.raw()
        body = msgspec.msgpack.encode(Cancel("abc", 1))
        for byte in b"".join(frame(body, number) for number in range(3)):
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        await until(lambda: wire.ends and len(wire.ends[0].messages) == 3)


async def test_a_slow_peer_is_felt_and_finally_cut_off():
    async with open_wire() as wire:
        client = await wire.connect()
        await until(lambda: wire.ends and wire.ends[0].opened.is_set())
        client.channel._transport.pause_reading()
        server = wire.ends[0].channel
        server.max_pending_bytes = 4 << 20
        for _ in range(10_000):
            if not server.send(Failed("x" * 10_000, 0, "", "", False)):
                break
            await asyncio.sleep(0)
        assert not server.writable
        assert server.pending_bytes >= channel_module.WRITE_HIGH_BYTES
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(server.drained(), 0.05)
        client.channel._transport.resume_reading()
        await asyncio.wait_for(server.drained(), 10)
        assert server.writable
        client.channel._transport.pause_reading()
        for _ in range(10_000):
            server.send(Failed("x" * 10_000, 0, "", "", False))
            if server.closed:
                break
            await asyncio.sleep(0)
        await wire.ends[0].closed.wait()
        assert "unread" in str(wire.ends[0].error)


async def test_an_oversized_message_is_refused_by_the_sender_and_leaves_no_trace():
    async with open_wire() as wire:
        client = await wire.connect()
        with pytest.raises(ProtocolError, match="exceeds"):
            client.channel.send(Cancel("x" * (channel_module.MAX_FRAME_BYTES + 1), 0))
        client.channel.send(Cancel("fine", 0))
        await until(lambda: wire.ends and wire.ends[0].messages)
        assert wire.ends[0].messages == [Cancel("fine", 0)]


async def test_an_announced_giant_frame_closes_the_connection_before_it_is_read():
    async with open_wire() as wire:
        reader, writer = await wire.raw()
        writer.write(b"\xff" * 8)
        assert await read_to_end(reader) == b""
        assert isinstance(wire.ends[0].error, ProtocolError)


async def test_a_callback_may_refuse_a_message():
    async with open_wire() as wire:
        client = await wire.connect()
        await until(lambda: wire.ends and wire.ends[0].opened.is_set())

        def refuse(channel: Channel, message: Any) -> None:
            raise ProtocolError("not now")

        wire.ends[0].channel.on_message = refuse
        client.channel.send(Cancel("a", 0))
        client.channel.send(Cancel("b", 0))
        await asyncio.wait_for(client.closed.wait(), 10)
        assert str(wire.ends[0].error) == "not now"
        assert not wire.ends[0].messages


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=60).map(lambda body: frame(body, 0)),
        st.tuples(st.integers(0, 60), st.integers(0, 255)).map(lambda flip: corrupted(*flip)),
    )
)
def test_hostile_bytes_end_only_their_own_connection(hostile):
    async def scenario():
        async with open_wire() as wire:
            good = await wire.connect()
            reader, writer = await wire.raw()
            writer.write(hostile)
            writer.write_eof()
            await read_to_end(reader)
            good.channel.send(Cancel("alive", 0))
            await until(lambda: any(end.messages == [Cancel("alive", 0)] for end in wire.ends))
            assert not good.closed.is_set()
            assert all(end.error is None or isinstance(end.error, (ProtocolError, OSError)) for end in wire.ends)

    asyncio.run(scenario())


def corrupted(at: int, value: int) -> bytes:
    """The check is right all the same: the decoder itself has to cope."""
    body = bytearray(msgspec.msgpack.encode(Cancel("a" * 32, 7)))
    body[at % len(body)] = value
    return frame(body, 0)


@pytest.mark.parametrize("damage", ["flip", "lost", "twice", "swapped"])
async def test_what_the_link_did_to_frames_ends_the_connection(damage):
    frames = [frame(msgspec.msgpack.encode(Cancel("a" * 32, epoch)), epoch) for epoch in range(4)]
    sent = {
        "flip": [frames[0], frames[1][:-1] + bytes([frames[1][-1] ^ 1])],
        "lost": [frames[0], frames[2]],
        "twice": [frames[0], frames[0]],
        "swapped": [frames[0], frames[2], frames[1]],
    }[damage]
    async with open_wire() as wire:
        reader, writer = await wire.raw()
        writer.write(b"".join(sent))
        assert await read_to_end(reader) == b""
        assert wire.ends[0].messages == [Cancel("a" * 32, 0)]
        assert "damaged or out of order" in str(wire.ends[0].error)
