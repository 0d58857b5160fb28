"""One suite for every transport: what workers may rely on."""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import random
import resource
import shutil
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import uvloop

from engine_core.config import TransferConfig
from engine_core.device_fabric import JaxFabric
from engine_core.errors import (
    BatonError,
    LayoutMismatch,
    NoFreePages,
    RequestCancelled,
    TicketExpired,
    TransferError,
    TransferTimeout,
)
from engine_core.messages import PeerAddress, TokenChunk
from engine_core.types import FinishReason
from kv_transfer.base import Layers
from kv_transfer.compiled.digester import build_digester
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.inproc import Faults, InprocKvReceiver, InprocKvSender, InprocNetwork
from kv_transfer.layout import BlockLayout
from kv_transfer.plane_receiver import PlaneKvReceiver
from kv_transfer.plane_sender import PlaneKvSender
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.sender import NetKvSender
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.wire import HOST_TRANSPORTS, Transport

ARENA_BYTES = 16 << 20
NUM_CONNECTIONS = 3
ALL_TRANSPORTS = TransferOptions.of(TransferConfig(), None)
LAYOUT = BlockLayout(num_layers=3, page_size=4, num_kv_heads=2, head_dim=8, dtype="bfloat16")


@functools.cache
def compiled_library() -> Path | None:
    """As workers have it, where there is a compiler; other tests of hand-offs go without."""
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory)
    return build_digester(directory)


class PrefillEars:
    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self.cancelled: list[tuple[str, int, BatonError]] = []

    def on_ticket(self, ticket: Ticket) -> None:
        self.tickets.append(ticket)

    def on_cancel(self, request_id: str, epoch: int, error: BatonError) -> None:
        self.cancelled.append((request_id, epoch, error))


class DecodeEars:
    def __init__(self) -> None:
        self.blocks: dict[tuple[str, int], dict[int, list[np.ndarray]]] = {}
        self.generations: dict[tuple[str, int], dict[int, int]] = {}
        self.done: dict[tuple[str, int], TokenChunk] = {}
        self.lost: dict[tuple[str, int], list[int]] = {}
        self.failed: dict[tuple[str, int], BatonError] = {}
        self.threads: set[int] = set()
        self.keeps = True  # the memory of the blocks, and so the sender waiting

    def on_blocks(
        self, request_id: str, epoch: int, indices: Sequence[int], layers: Layers, generations: Sequence[int]
    ) -> None:
        self.threads.add(threading.get_ident())
        for place, (index, generation) in enumerate(zip(indices, generations, strict=True)):
            found = self.blocks.setdefault((request_id, epoch), {})
            assert index not in found
            found[index] = [layer[place] for layer in layers] if self.keeps else []
            self.generations.setdefault((request_id, epoch), {})[index] = generation

    def on_done(self, request_id: str, epoch: int, first: TokenChunk, lost: Sequence[int]) -> None:
        assert (request_id, epoch) not in self.done
        self.done[request_id, epoch] = first
        self.lost[request_id, epoch] = list(lost)

    def on_failed(self, request_id: str, epoch: int, error: BatonError) -> None:
        assert (request_id, epoch) not in self.failed
        self.failed[request_id, epoch] = error


class Pair:
    """A prefill and a decode worker's transports, and what each hears."""

    def __init__(self, kind: str, layout: BlockLayout, decode_layout: BlockLayout) -> None:
        self.kind, self.layout, self.decode_layout = kind, layout, decode_layout
        self.encrypts = False
        self.network = InprocNetwork(Faults(random.Random(0)))
        self.prefill, self.decode = PrefillEars(), DecodeEars()
        self.sender: Any
        self.receiver: Any
        self.address = PeerAddress("127.0.0.1", 0, 0)

    def options(self, transport: Transport) -> TransferOptions:
        return TransferOptions(
            transports=(transport,),
            num_connections=NUM_CONNECTIONS,
            arena_bytes=ARENA_BYTES,
            encrypts=self.encrypts,
            library=compiled_library(),
        )

    @property
    def is_plane(self) -> bool:
        return self.kind.startswith("plane")

    def identity(self, name: str, fingerprint: str) -> KvIdentity:
        layout = self.decode_layout if name == "d" else self.layout
        return KvIdentity(worker_id=name, incarnation=1, fingerprint=fingerprint, layout=layout)

    async def start(self, limit: int, fingerprints: tuple[str, str]) -> None:
        prefill, decode = self.identity("p", fingerprints[0]), self.identity("d", fingerprints[1])
        fabrics = [None, None]
        if self.kind == Transport.DEVICE:
            fabrics = [JaxFabric("127.0.0.1", jax.devices()[0]) for _ in range(2)]
        if self.is_plane:
            options = self.options(Transport(self.kind.removeprefix("plane ")))
            self.sender = PlaneKvSender(prefill, b"secret", self.prefill, options)
            self.receiver = PlaneKvReceiver(decode, b"secret", self.decode, options)
            await self.receiver.start()
            port = await self.sender.start("127.0.0.1", 0)
        elif self.kind != "inproc":
            options = self.options(Transport(self.kind))
            self.sender = NetKvSender(prefill, b"secret", self.prefill, limit, options, fabrics[0])
            self.receiver = NetKvReceiver(decode, b"secret", self.decode, options, fabrics[1])
            port = await self.sender.start("127.0.0.1", 0)
        else:
            self.sender = InprocKvSender(self.network, prefill, self.prefill, limit)
            self.receiver = InprocKvReceiver(self.network, decode, self.decode)
            port = await self.sender.start()
        self.address = PeerAddress("127.0.0.1", 0, port)

    def ticket(self, name: str, blocks: Sequence[int], serial: int = 1, lease_s: float = 30) -> Ticket:
        landing = tuple(Landing(index, 100 + index) for index in blocks)
        return Ticket(name, 0, serial, landing, round(lease_s * 1000))

    def layers(self, indices: Sequence[int], seed: int = 0) -> list[np.ndarray]:
        """Content that depends on the block's index alone."""
        dtype = self.layout.numpy_dtype
        return [
            np.stack([content(self.layout, index, layer, seed) for index in indices]).astype(dtype)
            for layer in range(self.layout.num_layers)
        ]

    def cut(self) -> None:
        """Lose the connection, without warning."""
        if self.kind != "inproc":
            for link in self.sender.links:
                link.main._socket.shutdown(2)
        else:
            for link in list(self.sender.links):
                link.lose("cut")

    async def hold(self) -> None:
        """The receiver stops reading."""
        if self.is_plane:
            os.kill(self.receiver._plane._process.pid, signal.SIGSTOP)
        self.network.faults.paused = True
        if self.kind == Transport.TCP:
            await until(lambda: all(len(link._connections) == NUM_CONNECTIONS for link in self.sender.links))
        for connection in self.connections():
            self.receiver.loop.remove_reader(connection._socket)

    def release(self) -> None:
        if self.is_plane:
            os.kill(self.receiver._plane._process.pid, signal.SIGCONT)
        self.network.resume()
        for connection in self.connections():
            self.receiver.loop.add_reader(connection._socket, connection._on_readable)

    def connections(self) -> list[Any]:
        if self.kind == "inproc" or self.is_plane:
            return []
        return [connection for link in self.receiver._links.values() for connection in link._connections]

    def check_blocks(self, name: str, wanted: Sequence[int], seed: int = 0) -> None:
        blocks = self.decode.blocks.get((name, 0), {})
        assert sorted(blocks) == sorted(wanted)
        for index, layers in blocks.items():
            assert self.decode.generations[name, 0][index] == 100 + index
            for number, layer in enumerate(layers):
                assert layer.dtype == self.layout.numpy_dtype
                assert not layer.flags.writeable
                expected = content(self.layout, index, number, seed).astype(self.layout.numpy_dtype)
                np.testing.assert_array_equal(layer, expected)

    async def check_nothing_held(self) -> None:
        """Once nobody holds a block any more."""
        self.decode.blocks.clear()
        if self.is_plane:
            await until(lambda: not self.sender._loans and self.sender.inflight_bytes == 0)
            assert not self.sender._open and not self.receiver._open
            return
        await until(lambda: len(self.sender.core) == len(self.receiver.core) == self.sender.inflight_bytes == 0)
        for link in self.sender.links if self.kind != "inproc" else ():
            await until(lambda link=link: not link._frames)
        if self.kind == Transport.SHARED_MEMORY:
            await until(lambda: not self.sender.own_memory.arena.lent_bytes)


def content(layout: BlockLayout, index: int, layer: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([index, layer, seed])
    return rng.standard_normal(layout.shape, np.float32)


@asynccontextmanager
async def open_pair(
    kind: str,
    layout: BlockLayout = LAYOUT,
    limit: int = 1 << 30,
    fingerprints: tuple[str, str] = ("f", "f"),
    decode_layout: BlockLayout | None = None,
    encrypts: bool = False,
) -> AsyncIterator[Pair]:
    pair = Pair(kind, layout, decode_layout or layout)
    pair.encrypts = encrypts
    await pair.start(limit, fingerprints)
    try:
        yield pair
    finally:
        await pair.receiver.close()
        await pair.sender.close()
        await asyncio.sleep(0.01)


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def first_token(name: str, reason: FinishReason | None = None) -> TokenChunk:
    return TokenChunk(name, 0, 0, [17], reason)


IN_THIS_PROCESS = ["inproc", *Transport]


@pytest.fixture(params=[*IN_THIS_PROCESS, *(f"plane {transport}" for transport in HOST_TRANSPORTS)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_chunks_arrive_verified_then_the_first_token(kind):
    async with open_pair(kind) as pair:
        pair.sender.offer("r", 0, 30)
        ticket = pair.ticket("r", [1, 3, 4])
        pair.receiver.request(pair.address, ticket)
        await until(lambda: pair.prefill.tickets == [ticket])
        pair.sender.send_blocks("r", 0, [0, 1, 2], pair.layers([0, 1, 2]))
        await until(lambda: pair.decode.blocks)
        pair.check_blocks("r", [1])
        pair.sender.send_blocks("r", 0, [3, 4], [layer.view(np.uint16) for layer in pair.layers([3, 4])])
        pair.sender.finish("r", 0, first_token("r", FinishReason.LENGTH))
        await until(lambda: pair.decode.done)
        assert pair.decode.done["r", 0] == first_token("r", FinishReason.LENGTH)
        assert pair.decode.lost["r", 0] == []
        pair.check_blocks("r", [1, 3, 4])
        assert pair.decode.threads == {threading.get_ident()}
        await pair.check_nothing_held()


async def test_the_ticket_may_come_when_all_is_computed(kind):
    async with open_pair(kind) as pair:
        pair.sender.offer("r", 0, 30)
        pair.sender.send_blocks("r", 0, range(6), pair.layers(range(6)))
        pair.sender.finish("r", 0, first_token("r"))
        await until(lambda: pair.sender.inflight_bytes == 6 * LAYOUT.block_bytes)
        await asyncio.sleep(0.05)
        pair.receiver.request(pair.address, pair.ticket("r", [5, 0, 2]))
        await until(lambda: pair.decode.done)
        pair.check_blocks("r", [0, 2, 5])
        await pair.check_nothing_held()


async def test_an_empty_ticket_brings_the_first_token_alone(kind):
    async with open_pair(kind) as pair:
        pair.receiver.request(pair.address, pair.ticket("r", []))
        pair.sender.offer("r", 0, 30)
        pair.sender.send_blocks("r", 0, [0], pair.layers([0]))
        pair.sender.finish("r", 0, first_token("r"))
        await until(lambda: pair.decode.done)
        assert not pair.decode.blocks


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uv"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_many_requests_from_other_threads(kind, loop_factory, dtype):
    layout = BlockLayout(num_layers=4, page_size=16, num_kv_heads=2, head_dim=32, dtype=dtype)
    names = [f"r{number}" for number in range(12)]

    async def scenario() -> None:
        async with open_pair(kind, layout) as pair:

            def prefill(name: str) -> None:
                pair.sender.offer(name, 0, 30)
                for at in range(0, 40, 8):
                    indices = range(at, at + 8)
                    pair.sender.send_blocks(name, 0, indices, pair.layers(indices, seed=int(name[1:])))
                pair.sender.finish(name, 0, first_token(name))

            def ask() -> None:
                for serial, name in enumerate(names):
                    pair.receiver.request(pair.address, pair.ticket(name, range(serial % 5, 40), serial))

            await asyncio.gather(asyncio.to_thread(ask), *(asyncio.to_thread(prefill, name) for name in names))
            await until(lambda: len(pair.decode.done) == len(names))
            for serial, name in enumerate(names):
                pair.check_blocks(name, range(serial % 5, 40), seed=serial)
            await pair.check_nothing_held()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario())


async def test_cancel_by_decode_reaches_the_prefill_worker(kind):
    async with open_pair(kind) as pair:
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        await until(lambda: pair.prefill.tickets)
        pair.receiver.cancel("r", 0)
        pair.receiver.cancel("never heard of", 0)
        await until(lambda: pair.prefill.cancelled)
        assert isinstance(pair.prefill.cancelled[0][2], RequestCancelled)
        pair.sender.send_blocks("r", 0, [0], pair.layers([0]))
        pair.sender.finish("r", 0, first_token("r"))
        await asyncio.sleep(0.05)
        assert not pair.decode.blocks
        assert not pair.decode.done
        assert not pair.decode.failed
        await pair.check_nothing_held()


async def test_cancel_before_the_request_reaches_the_prefill_worker(kind):
    async with open_pair(kind) as pair:
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        pair.receiver.cancel("r", 0)
        await asyncio.sleep(0.2)
        pair.sender.offer("r", 0, 30)
        await until(lambda: pair.prefill.cancelled)
        assert not pair.prefill.tickets
        await pair.check_nothing_held()


async def test_abort_by_prefill_reaches_decode(kind):
    async with open_pair(kind) as pair:
        pair.sender.offer("early", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("early", [0]))
        await until(lambda: pair.prefill.tickets)
        pair.sender.abort("early", 0, NoFreePages("all taken"))
        pair.sender.abort("late", 0, NoFreePages("all taken"))
        await asyncio.sleep(0.01)
        pair.receiver.request(pair.address, pair.ticket("late", [0]))
        await until(lambda: len(pair.decode.failed) == 2)
        for error in pair.decode.failed.values():
            assert isinstance(error, NoFreePages)
            assert str(error) == "all taken"
        await pair.check_nothing_held()


async def test_leases_end_what_nobody_continues(kind):
    async with open_pair(kind) as pair:
        pair.sender.offer("no ticket", 0, 0.1)
        pair.sender.send_blocks("no ticket", 0, [0], pair.layers([0]))
        pair.receiver.request(pair.address, pair.ticket("no offer", [0], lease_s=0.1))
        await until(lambda: pair.prefill.cancelled and pair.decode.failed)
        assert isinstance(pair.prefill.cancelled[0][2], TicketExpired)
        assert isinstance(pair.decode.failed["no offer", 0], (TransferTimeout, TicketExpired))
        await pair.check_nothing_held()


@pytest.mark.parametrize("kind", IN_THIS_PROCESS)
async def test_a_lost_connection_is_an_error_on_both_sides_and_the_next_request_works(kind):
    async with open_pair(kind) as pair:
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        await until(lambda: pair.prefill.tickets)
        pair.cut()
        await until(lambda: pair.prefill.cancelled and pair.decode.failed)
        assert pair.decode.failed["r", 0].retryable
        assert isinstance(pair.prefill.cancelled[0][2], TransferError)
        pair.sender.offer("s", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("s", [0]))
        pair.sender.send_blocks("s", 0, [0], pair.layers([0]))
        pair.sender.finish("s", 0, first_token("s"))
        await until(lambda: ("s", 0) in pair.decode.done)
        await pair.check_nothing_held()


@pytest.mark.parametrize("kind", HOST_TRANSPORTS)
async def test_without_memory_to_share_a_hand_off_fails_and_the_next_one_works(kind):
    """The system refuses new memory, as it does where a limit is reached or too many descriptors are open."""
    async with open_pair(kind) as pair:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ARENA_BYTES // 2, limits[1]))
        try:
            pair.sender.offer("r", 0, 30)
            pair.receiver.request(pair.address, pair.ticket("r", [0]))
            pair.sender.send_blocks("r", 0, [0], pair.layers([0]))
            pair.sender.finish("r", 0, first_token("r"))
            await until(lambda: pair.decode.failed)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert pair.decode.failed["r", 0].retryable
        pair.sender.offer("s", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("s", [0]))
        pair.sender.send_blocks("s", 0, [0], pair.layers([0]))
        pair.sender.finish("s", 0, first_token("s"))
        await until(lambda: ("s", 0) in pair.decode.done)
        pair.check_blocks("s", [0])
        await pair.check_nothing_held()


async def test_nobody_listens(kind):
    async with open_pair(kind) as pair:
        await pair.sender.close()
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        await until(lambda: pair.decode.failed)
        assert pair.decode.failed["r", 0].retryable
        await pair.sender.start(*(("127.0.0.1", 0) if kind != "inproc" else ()))


async def test_different_fingerprints_never_pair(kind):
    async with open_pair(kind, fingerprints=("f", "g")) as pair:
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        await until(lambda: pair.decode.failed)
        error = pair.decode.failed["r", 0]
        assert isinstance(error, LayoutMismatch)
        assert not error.retryable
        assert not pair.prefill.tickets


async def test_a_slow_receiver_is_felt_by_the_sender_and_memory_stays_bounded(kind):
    layout = BlockLayout(num_layers=2, page_size=64, num_kv_heads=8, head_dim=128, dtype="float32")  # 1 MiB a block
    async with open_pair(kind, layout, limit=32 << 20) as pair:
        pair.decode.keeps = False
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", range(200)))
        await until(lambda: pair.prefill.tickets)
        await pair.hold()
        sent = 0
        chunk = pair.layers(range(4))
        while pair.sender.writable:
            pair.sender.send_blocks("r", 0, range(sent, sent + 4), chunk)
            sent += 4
            await asyncio.sleep(0.001)
            assert sent < 100, "the limit has no effect"
        assert pair.sender.inflight_bytes <= 40 << 20
        waiting = asyncio.ensure_future(pair.sender.wait_writable())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        pair.release()
        await asyncio.wait_for(waiting, 10)
        while sent < 200:
            await pair.sender.wait_writable()
            pair.sender.send_blocks("r", 0, range(sent, sent + 4), chunk)
            sent += 4
        pair.sender.finish("r", 0, first_token("r"))
        await until(lambda: pair.decode.done)
        assert sorted(pair.decode.blocks["r", 0]) == list(range(200))
        await pair.check_nothing_held()


async def test_cancel_drops_what_is_queued(kind):
    layout = BlockLayout(num_layers=2, page_size=64, num_kv_heads=8, head_dim=128, dtype="float32")
    async with open_pair(kind, layout) as pair:
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", range(64)))
        await until(lambda: pair.prefill.tickets)
        await pair.hold()
        pair.sender.send_blocks("r", 0, range(64), pair.layers(range(64)))
        await asyncio.sleep(0.02)
        held = pair.sender.inflight_bytes
        pair.sender.abort("r", 0, RequestCancelled("gateway"))
        await until(lambda: pair.sender.inflight_bytes < held)
        assert pair.sender.inflight_bytes <= 24 << 20
        pair.release()
        await until(lambda: pair.decode.failed)
        assert isinstance(pair.decode.failed["r", 0], RequestCancelled)
        await pair.check_nothing_held()


@pytest.mark.parametrize("wrong", ["shape", "layers", "dtype"])
async def test_arrays_that_contradict_the_layout_are_the_callers_error(kind, wrong):
    async with open_pair(kind) as pair:
        layers = pair.layers([0])
        if wrong == "shape":
            layers = [layer[:, :2] for layer in layers]
        if wrong == "layers":
            layers = layers[:1]
        if wrong == "dtype":
            layers = [layer.astype(np.float32) for layer in layers]
        with pytest.raises(ValueError, match="expected"):
            pair.sender.send_blocks("r", 0, [0], layers)
        assert pair.sender.inflight_bytes == 0


async def test_damage_on_the_way_is_repaired():
    async with open_pair("inproc") as pair:
        pair.network.faults.corrupt = 0.5
        for number in range(20):
            name = f"r{number}"
            pair.sender.offer(name, 0, 30)
            pair.receiver.request(pair.address, pair.ticket(name, [0]))
            pair.sender.send_blocks(name, 0, [0], pair.layers([0]))
            pair.sender.finish(name, 0, first_token(name))
        await until(lambda: len(pair.decode.done) + len(pair.decode.failed) == 20)
        assert sum(not lost for lost in pair.decode.lost.values()) >= 12
        for (name, _), lost in pair.decode.lost.items():
            pair.check_blocks(name, [] if lost else [0])
        await pair.check_nothing_held()


async def test_damage_that_does_not_end_loses_blocks_and_not_the_hand_off():
    async with open_pair("inproc") as pair:
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0, 1, 2]))
        pair.sender.send_blocks("r", 0, [0], pair.layers([0]))
        await until(lambda: pair.decode.blocks)
        pair.network.faults.corrupt = 1
        pair.sender.send_blocks("r", 0, [1, 2], pair.layers([1, 2]))
        await asyncio.sleep(0.05)
        pair.network.faults.corrupt = 0
        pair.sender.finish("r", 0, first_token("r"))
        await until(lambda: pair.decode.done)
        assert pair.decode.lost["r", 0] == [1, 2]
        pair.check_blocks("r", [0])
        await pair.check_nothing_held()


@pytest.mark.parametrize("kind", [f"plane {transport}" for transport in HOST_TRANSPORTS])
async def test_what_was_damaged_behind_the_copy_is_lost_in_every_plane(kind):
    """The arena was written to after digests were taken: no checksum of it is right, however often it is sent."""
    async with open_pair(kind) as pair:
        pair.sender.offer("r", 0, 30)
        pair.sender.send_blocks("r", 0, [0, 1], pair.layers([0, 1]))
        pair.sender.finish("r", 0, first_token("r"))
        memory, _ = pair.sender._loans[1]
        memory[-1] ^= 1
        pair.receiver.request(pair.address, pair.ticket("r", [0, 1]))
        await until(lambda: pair.decode.done)
        assert pair.decode.lost["r", 0] == [0, 1]  # they travelled in one frame
        assert not pair.decode.blocks
        await pair.check_nothing_held()


async def test_a_lost_frame_is_sent_again():
    async with open_pair("inproc") as pair:
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        await until(lambda: pair.prefill.tickets)
        pair.network.faults.drop = 1
        pair.sender.send_blocks("r", 0, [0], pair.layers([0]))
        await asyncio.sleep(0.01)
        pair.network.faults.drop = 0
        pair.sender.finish("r", 0, first_token("r"))
        await until(lambda: pair.decode.done)
        pair.check_blocks("r", [0])
        await pair.check_nothing_held()


def test_a_bfloat16_array_is_what_arrives():
    assert LAYOUT.numpy_dtype == np.dtype(ml_dtypes.bfloat16)
