"""The fault proxy: what goes in, what comes out, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.chaos.frames import Frames, kv_payload
from benchmarks.chaos.proxy import FAIR, FaultProxy, Weather
from kv_transfer.framing import frame
from kv_transfer.wire import KvBeat, KvBlocks, Place, encode_body

PIECES = [frame(bytes([index]) * (1 + index % 7), index) for index in range(200)]


class Ends:
    """A client and a server with the proxy between them."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter
        self.far_reader: asyncio.StreamReader
        self.far_writer: asyncio.StreamWriter

    async def send(self) -> list[bytes]:
        """All pieces to the server; what arrived."""
        for piece in PIECES:
            self.writer.write(piece)
        self.writer.write_eof()
        async with asyncio.timeout(10):
            received = await self.far_reader.read()
        return Frames().feed(received)


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accepted.put((reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy = FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1], random.Random(1), Frames)
    await proxy.start()
    both = Ends(proxy)
    both.reader, both.writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    both.far_reader, both.far_writer = await accepted.get()
    try:
        yield both
    finally:
        await proxy.close()
        server.close()
        for writer in (both.writer, both.far_writer):
            writer.transport.abort()
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) == 1
        assert not proxy.num_open


async def test_in_fair_weather_nothing_changes_and_each_way_ends_by_itself():
    async with ends() as both:
        assert await both.send() == PIECES
        both.far_writer.write(PIECES[9])
        assert await both.reader.readexactly(len(PIECES[9])) == PIECES[9]
        both.far_writer.write_eof()
        assert await both.reader.read() == b""


@pytest.mark.parametrize("harm", ["lose", "double", "swap", "flip"])
async def test_pieces_are_harmed_one_by_one(harm: str):
    async with ends() as both:
        both.proxy.to_server = Weather(**{harm: 0.2})
        received = await both.send()
        counts = both.proxy.counts
        if harm == "lose":
            assert counts.lost > 10 and received == sorted(received, key=PIECES.index)
            assert len(received) == len(PIECES) - counts.lost
        elif harm == "double":
            assert counts.doubled > 10 and len(received) == len(PIECES) + counts.doubled
            assert list(dict.fromkeys(received)) == PIECES
        elif harm == "swap":
            assert counts.swapped > 10 and received != PIECES
            assert sorted(received) == sorted(PIECES)
        else:
            assert counts.flipped > 10


async def test_a_flip_changes_one_bit():
    async with ends() as both:
        both.proxy.to_server = Weather(flip=1.0)
        both.writer.write(PIECES[5])
        received = await both.far_reader.readexactly(len(PIECES[5]))
        changed = [a ^ b for a, b in zip(received, PIECES[5], strict=True)]
        assert sum(map(int.bit_count, changed)) == 1


async def test_weather_changes_while_it_runs():
    loop = asyncio.get_running_loop()
    async with ends() as both:
        both.proxy.to_server = Weather(holds=True)
        both.writer.write(b"".join(PIECES[:3]))
        both.far_writer.write(PIECES[9])
        assert await both.reader.readexactly(len(PIECES[9])) == PIECES[9], "the other way is fair"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(both.far_reader.read(1), 0.2)
        both.proxy.to_server = FAIR
        await asyncio.wait_for(both.far_reader.readexactly(len(b"".join(PIECES[:3]))), 5)
        both.proxy.to_server = Weather(delay_s=0.3)
        began_at = loop.time()
        both.writer.write(PIECES[0])
        await both.far_reader.readexactly(len(PIECES[0]))
        assert loop.time() - began_at >= 0.3
        both.proxy.to_server = Weather(bytes_per_s=200)
        began_at = loop.time()
        both.writer.write(frame(b"x" * 92, 0))
        await both.far_reader.readexactly(100)
        assert loop.time() - began_at >= 0.4


async def test_a_cut_reaches_both_ends_and_a_new_connection_is_welcome():
    async with ends() as both:
        both.proxy.cut()
        for reader in (both.reader, both.far_reader):
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.readexactly(1), 5)
        _, writer = await asyncio.open_connection("127.0.0.1", both.proxy.port)
        writer.transport.abort()
        assert both.proxy.counts.cut == 1


async def test_a_server_that_is_not_there_resets_the_client():
    probe = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = probe.sockets[0].getsockname()[1]
    probe.close()
    proxy = FaultProxy("127.0.0.1", port, random.Random(1))
    await proxy.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.readexactly(1), 5)
    writer.transport.abort()
    await proxy.close()


def test_payload_belongs_to_its_frame():
    blocks = KvBlocks("r", 0, 1, 1, (0, 1), (1, 1), (0, 1), (0, 1), "float32", (0, 0), 64, None)
    placed = KvBlocks("r", 0, 1, 1, (0, 1), (1, 1), (0, 1), (0, 1), "float32", (0, 0), 64, Place(1, 0, 64))
    pieces = [
        frame(encode_body(blocks), 0) + bytes(64),
        frame(encode_body(placed), 1),
        frame(encode_body(KvBeat()), 2),
        frame(b"\xc1 no msgpack", 3),
    ]
    cutter, found = Frames(kv_payload), []
    for byte in b"".join(pieces):
        found += cutter.feed(bytes([byte]))
    assert found == pieces
