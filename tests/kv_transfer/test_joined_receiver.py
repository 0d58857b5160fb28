"""Blocks whose heads come from several hosts: whole or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from engine_core.errors import LayoutMismatch, TransferError
from engine_core.messages import KvShard, PeerAddress, TokenChunk
from kv_transfer.endpoint import KvIdentity
from kv_transfer.joined_receiver import JoinedReceiver
from kv_transfer.layout import BlockLayout
from kv_transfer.sender import NetKvSender
from kv_transfer.ticket import Landing, Ticket, part_id
from tests.kv_transfer.test_transport import ALL_TRANSPORTS, DecodeEars, PrefillEars

LAYOUT = BlockLayout(num_layers=2, page_size=4, num_kv_heads=4, head_dim=8, dtype="float32")
HEADS = [(0, 1), (1, 3)]
BLOCKS = [2, 3, 4, 7]
FIRST = TokenChunk("r", 0, 0, [5])
KEY = ("r", 0)


def identity(name: str, layout: BlockLayout) -> KvIdentity:
    return KvIdentity(worker_id=name, incarnation=1, fingerprint="f", layout=layout)


def content() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((len(BLOCKS), *LAYOUT.shape)).astype(np.float32) for _ in range(LAYOUT.num_layers)]


def ticket() -> Ticket:
    return Ticket("r", 0, 1, tuple(Landing(index, 100 + index) for index in BLOCKS), 30_000)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Trio:
    """Two hosts of a prefill worker and a decode worker."""

    def __init__(self) -> None:
        self.ears = [PrefillEars() for _ in HEADS]
        parts = [identity("p", LAYOUT).part(*heads) for heads in HEADS]
        self.senders = [
            NetKvSender(part, b"secret", ears, 1 << 24, ALL_TRANSPORTS)
            for part, ears in zip(parts, self.ears, strict=True)
        ]
        self.decode = DecodeEars()
        self.receiver = JoinedReceiver(identity("d", LAYOUT), b"secret", self.decode, ALL_TRANSPORTS)

    async def start(self) -> None:
        await self.receiver.start()
        ports = [await sender.start("127.0.0.1", 0) for sender in self.senders]
        self.shards = [KvShard("127.0.0.1", port, *heads) for port, heads in zip(ports, HEADS, strict=True)]

    def request(self) -> None:
        self.receiver.request(PeerAddress("127.0.0.1", 0, self.shards[0].kv_port, tuple(self.shards)), ticket())

    def send(self, host: int, places: list[int]) -> None:
        """The host's heads of some of the blocks."""
        first, count = HEADS[host]
        layers = [layer[places][:, :, 2 * first : 2 * (first + count)] for layer in content()]
        self.senders[host].send_blocks(part_id("r", first), 0, [BLOCKS[place] for place in places], layers)

    def offer(self) -> None:
        for sender, (first, _) in zip(self.senders, HEADS, strict=True):
            sender.offer(part_id("r", first), 0, 30)

    def finish(self, host: int) -> None:
        self.senders[host].finish(part_id("r", HEADS[host][0]), 0, FIRST)


@pytest.fixture
async def trio() -> AsyncIterator[Trio]:
    made = Trio()
    await made.start()
    yield made
    await made.receiver.close()
    for sender in made.senders:
        await sender.close()


async def test_blocks_are_told_when_all_their_heads_are_here(trio: Trio) -> None:
    trio.offer()
    trio.request()
    await until(lambda: all(ears.tickets for ears in trio.ears))
    trio.send(0, [0, 1, 2])
    trio.send(1, [2, 3])
    await asyncio.sleep(0.1)
    assert not trio.decode.blocks
    trio.send(1, [0, 1])
    await until(lambda: len(trio.decode.blocks.get(KEY, ())) == 3)
    trio.finish(1)
    trio.send(0, [3])
    await asyncio.sleep(0.05)
    assert not trio.decode.done
    trio.finish(0)
    await until(lambda: KEY in trio.decode.done)
    for place, block in enumerate(BLOCKS):
        assert trio.decode.generations[KEY][block] == 100 + block
        for got, sent in zip(trio.decode.blocks[KEY][block], content(), strict=True):
            np.testing.assert_array_equal(got, sent[place])
    await until(lambda: not trio.receiver.num_open and not sum(sender.inflight_bytes for sender in trio.senders))


async def test_a_host_that_gives_up_ends_all_parts(trio: Trio) -> None:
    trio.offer()
    trio.request()
    await until(lambda: all(ears.tickets for ears in trio.ears))
    trio.send(0, [0, 1, 2, 3])
    trio.finish(0)
    trio.senders[1].abort(part_id("r", 1), 0, TransferError("out of luck"))
    await until(lambda: trio.decode.failed)
    assert "out of luck" in str(trio.decode.failed[KEY]) and not trio.decode.blocks and not trio.receiver.num_open
    await until(lambda: not sum(sender.inflight_bytes for sender in trio.senders))


async def test_blocks_that_one_host_lacks_are_lost_with_those_that_came_with_them(trio: Trio) -> None:
    trio.offer()
    trio.request()
    await until(lambda: all(ears.tickets for ears in trio.ears))
    trio.send(0, [0, 1])
    await asyncio.sleep(0.1)
    trio.send(0, [2, 3])
    trio.send(1, [1, 2, 3])
    await until(lambda: len(trio.decode.blocks.get(KEY, ())) == 2)
    trio.finish(0)
    trio.receiver.on_done(part_id("r", 1), 0, FIRST, [BLOCKS[0]])
    await until(lambda: KEY in trio.decode.done)
    assert set(trio.decode.blocks[KEY]) == set(BLOCKS[2:])
    assert trio.decode.lost[KEY] == BLOCKS[:2]


async def test_a_cancel_reaches_every_host(trio: Trio) -> None:
    trio.offer()
    trio.request()
    await until(lambda: all(ears.tickets for ears in trio.ears))
    trio.receiver.cancel(*KEY)
    await until(lambda: all(ears.cancelled for ears in trio.ears))
    assert not trio.decode.failed and not trio.receiver.num_open


async def test_a_host_of_other_heads_is_refused(trio: Trio) -> None:
    """It says in each frame which heads it brings."""
    other = NetKvSender(identity("p", LAYOUT).part(0, 3), b"secret", PrefillEars(), 1 << 24, ALL_TRANSPORTS)
    trio.shards[1] = KvShard("127.0.0.1", await other.start("127.0.0.1", 0), 1, 3)
    trio.request()
    other.offer(part_id("r", 1), 0, 30)
    other.send_blocks(part_id("r", 1), 0, BLOCKS, [layer[:, :, :6] for layer in content()])
    await until(lambda: trio.decode.failed)
    assert "heads (0, 3), expected (1, 4)" in str(trio.decode.failed[KEY]) and not trio.decode.blocks
    await other.close()


@pytest.mark.parametrize("heads", [[(0, 1), (0, 3)], [(0, 1), (1, 2)], [(0, 1), (2, 2)], [(0, 4), (4, 0)], [(1, 3)]])
async def test_an_address_without_each_head_once_is_refused(trio: Trio, heads: list[tuple[int, int]]) -> None:
    trio.shards = [KvShard("127.0.0.1", 1, *each) for each in heads]
    trio.request()
    await until(lambda: trio.decode.failed)
    assert isinstance(trio.decode.failed[KEY], LayoutMismatch) and not trio.receiver.num_open
