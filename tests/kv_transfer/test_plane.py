"""The data plane as a process: its end, its worker's end, and memory that a lost reader may still read."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal

import numpy as np
import pytest

from engine_core.errors import ConfigError, RequestCancelled, TransferError
from kv_transfer import plane_sender
from kv_transfer.blocks import HostBlocks
from kv_transfer.digester import PlainDigester, Rows
from kv_transfer.layout import BlockLayout
from kv_transfer.plane_sender import PlaneKvSender
from kv_transfer.wire import HOST_TRANSPORTS, Place, Transport
from tests.kv_transfer import test_transport
from tests.kv_transfer.test_transport import ALL_TRANSPORTS, Pair, PrefillEars, first_token, open_pair, until


async def hand_over(pair: Pair, name: str, seed: int = 0) -> None:
    pair.sender.offer(name, 0, 30)
    pair.receiver.request(pair.address, pair.ticket(name, [0, 1]))
    pair.sender.send_blocks(name, 0, [0, 1], pair.layers([0, 1], seed))
    pair.sender.finish(name, 0, first_token(name))
    await until(lambda: (name, 0) in pair.decode.done)
    pair.check_blocks(name, [0, 1], seed)


@pytest.mark.parametrize("transport", HOST_TRANSPORTS)
async def test_the_end_of_either_plane_fails_what_is_open_and_is_seen(transport):
    async with open_pair(f"plane {transport}") as pair:
        await hand_over(pair, "before")
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        await until(lambda: len(pair.prefill.tickets) == 2)
        os.kill(pair.receiver._plane._process.pid, signal.SIGKILL)
        await until(lambda: pair.decode.failed and pair.prefill.cancelled)
        assert pair.decode.failed["r", 0].retryable
        assert pair.sender.healthy and not pair.receiver.healthy
        pair.receiver.request(pair.address, pair.ticket("later", [0]))
        await until(lambda: ("later", 0) in pair.decode.failed)
        pair.sender.offer("s", 0, 30)
        pair.sender.send_blocks("s", 0, [0], pair.layers([0]))
        await until(lambda: pair.sender.inflight_bytes)
        os.kill(pair.sender._plane._process.pid, signal.SIGKILL)
        await until(lambda: len(pair.prefill.cancelled) == 2)
        assert isinstance(pair.prefill.cancelled[1][2], TransferError)
        assert not pair.sender.healthy
        assert pair.sender.inflight_bytes == 0
        pair.check_blocks("before", [0, 1])


async def test_a_plane_ends_with_its_worker():
    async with open_pair("plane tcp") as pair:
        processes = [pair.sender._plane._process, pair.receiver._plane._process]
        for end in (pair.sender, pair.receiver):
            end._plane._is_closing = True
            end._plane._channel.abort(ConnectionError("the worker was killed"))
        await until(lambda: all(process.popen.poll() is not None for process in processes))


async def test_what_a_lost_reader_may_still_read_is_never_written_again():
    """Decode's plane hangs, is given up, and its worker holds blocks of the former arena."""
    async with open_pair("plane shared_memory") as pair:
        await hand_over(pair, "a")
        arena = pair.sender._arena
        held = [layer for layers in pair.decode.blocks["a", 0].values() for layer in layers]
        expected = [layer.tobytes() for layer in held]
        os.kill(pair.receiver._plane._process.pid, signal.SIGKILL)
        await until(lambda: pair.sender._arena is not arena)
        async with open_pair("plane shared_memory") as other:
            for number in range(4):
                name = f"b{number}"
                pair.sender.offer(name, 0, 30)
                other.receiver.request(pair.address, pair.ticket(name, [0, 1]))
                pair.sender.send_blocks(name, 0, [0, 1], pair.layers([0, 1], number + 1))
                pair.sender.finish(name, 0, first_token(name))
                await until(lambda name=name: (name, 0) in other.decode.done)
                other.check_blocks(name, [0, 1], number + 1)
        assert [layer.tobytes() for layer in held] == expected


async def test_a_port_that_is_taken_is_a_configuration_error():
    async with open_pair("plane tcp") as pair:
        sender = PlaneKvSender(pair.identity("q", "f"), b"secret", PrefillEars(), ALL_TRANSPORTS)
        with pytest.raises(ConfigError, match="cannot listen"):
            await sender.start("127.0.0.1", pair.address.kv_port)


async def test_many_hand_overs_leave_nothing_behind():
    async with open_pair("plane shared_memory") as pair:
        for number in range(30):
            await hand_over(pair, f"r{number}", seed=number)
            pair.decode.blocks.clear()
        await pair.check_nothing_held()
        assert len(pair.receiver._segments) == 1
        await asyncio.sleep(0)


async def test_what_waits_behind_blocks_that_were_dropped_goes_on():
    """Decode's plane is frozen, blocks queue for room, their request is aborted: the next request must not wait."""
    layout = BlockLayout(num_layers=2, page_size=64, num_kv_heads=8, head_dim=128, dtype="float32")  # 1 MiB a block
    async with open_pair("plane shared_memory", layout) as pair:
        pair.decode.keeps = False
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", range(40)))
        await until(lambda: pair.prefill.tickets)
        await pair.hold()
        pair.sender.send_blocks("r", 0, range(40), pair.layers(range(40)))
        assert pair.sender._queue
        pair.sender.abort("r", 0, RequestCancelled("gateway"))
        await until(lambda: not pair.sender._queue)
        pair.sender.offer("s", 0, 30)
        pair.release()
        pair.receiver.request(pair.address, pair.ticket("s", [0]))
        pair.sender.send_blocks("s", 0, [0], pair.layers([0]))
        pair.sender.finish("s", 0, first_token("s"))
        await until(lambda: ("s", 0) in pair.decode.done)
        await pair.check_nothing_held()


@pytest.mark.parametrize(
    ("arena_mib", "blocks", "frames"), [(256, 3, 1), (256, 16, 3), (256, 64, 7), (256, 300, 15), (16, 64, 16)]
)
async def test_large_hand_overs_travel_in_large_frames(monkeypatch, arena_mib, blocks, frames):
    layout = BlockLayout(num_layers=2, page_size=64, num_kv_heads=8, head_dim=128, dtype="float32")  # 1 MiB a block
    pair = Pair("plane tcp", layout, layout)
    options = dataclasses.replace(pair.options(Transport.TCP), arena_bytes=arena_mib << 20)
    sender = PlaneKvSender(pair.identity("p", "f"), b"secret", pair.prefill, options)
    cut: list[int] = []
    monkeypatch.setattr(sender, "_put", lambda item: cut.append(len(item.indices)))
    layer = np.zeros((1, *layout.shape), np.float32)
    for transport in HOST_TRANSPORTS:
        cut.clear()
        sender._open["r", 0] = transport
        sender.send_blocks("r", 0, range(blocks), [np.broadcast_to(layer, (blocks, *layout.shape))] * 2)
        assert (len(cut), sum(cut)) == (frames, blocks)


@pytest.mark.parametrize(("arena_mib", "is_cut", "frames"), [(256, True, 1), (64, True, 3), (256, False, 3)])
async def test_a_socket_takes_what_the_worker_has_cut_where_decode_has_room_for_many(
    monkeypatch, arena_mib, is_cut, frames
):
    layout = BlockLayout(num_layers=2, page_size=64, num_kv_heads=8, head_dim=128, dtype="float32")  # 1 MiB a block
    monkeypatch.setattr(test_transport, "ARENA_BYTES", arena_mib << 20)
    async with open_pair("tcp", layout) as pair:
        sizes: list[int] = []
        deliver = pair.receiver.deliver
        monkeypatch.setattr(
            pair.receiver, "deliver", lambda header, landed: (sizes.append(len(header.blocks)), deliver(header, landed))
        )
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", range(12)))
        rows = np.stack([layer.reshape(12, -1).view(np.uint8) for layer in pair.layers(range(12))])
        place = Place(1, 0, 12 * layout.layer_bytes) if is_cut else None
        pair.sender.send_host_blocks("r", 0, tuple(range(12)), HostBlocks(rows, place))
        pair.sender.finish("r", 0, first_token("r"))
        await until(lambda: ("r", 0) in pair.decode.done)
        pair.check_blocks("r", range(12))
        assert (len(sizes), sum(sizes)) == (frames, 12)


class SpiedDigester:
    """One that notes which copies shall go past the caches."""

    def __init__(self, *, prefers_streams: bool) -> None:
        self.prefers_streams = prefers_streams
        self.noted: list[bool] = []

    def reader(self, rows: Rows) -> SpiedReader:
        return SpiedReader(rows, self.noted)


class SpiedReader:
    """Its reader."""

    def __init__(self, rows: Rows, noted: list[bool]) -> None:
        self._plain = PlainDigester().reader(rows)
        self._noted = noted

    def copy(self, first: int, targets: Rows, *, streams: bool) -> tuple[int, ...]:
        self._noted.append(streams)
        return self._plain.copy(first, targets, streams=streams)


@pytest.mark.parametrize(
    ("transport", "prefers_streams", "streams"),
    [(Transport.SHARED_MEMORY, False, True), (Transport.TCP, False, False), (Transport.TCP, True, True)],
)
async def test_copies_for_a_socket_go_past_the_caches_only_where_that_is_better(
    monkeypatch, transport, prefers_streams, streams
):
    monkeypatch.setattr(plane_sender, "STREAM_BYTES", 0)
    async with open_pair(f"plane {transport}") as pair:
        pair.sender._digester = spied = SpiedDigester(prefers_streams=prefers_streams)
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0, 1]))
        await until(lambda: pair.prefill.tickets)  # the way is known
        pair.sender.send_blocks("r", 0, [0, 1], pair.layers([0, 1]))
        pair.sender.finish("r", 0, first_token("r"))
        await until(lambda: pair.decode.done)
        assert set(spied.noted) == {streams}
        pair.check_blocks("r", [0, 1])
