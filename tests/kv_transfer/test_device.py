"""From device to device: what the conformance suite (test_transport) does not ask of the others."""

from __future__ import annotations

import asyncio
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine_core.config import TransferConfig
from engine_core.device_fabric import JaxFabric, block_digests
from engine_core.errors import ConfigError, TransferTimeout
from engine_core.messages import PeerAddress
from kv_transfer import receiver as receiver_module
from kv_transfer.handshake import TransferOptions
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.sender import NetKvSender
from kv_transfer.wire import HOST_TRANSPORTS, Transport
from tests.kv_transfer.test_transport import LAYOUT, Pair, first_token, open_pair, until


async def hand_over(pair: Pair, name: str, indices: list[int]) -> None:
    pair.sender.offer(name, 0, 30)
    pair.receiver.request(pair.address, pair.ticket(name, indices))
    pair.sender.send_blocks(name, 0, indices, pair.layers(indices))
    pair.sender.finish(name, 0, first_token(name))
    await until(lambda: (name, 0) in pair.decode.done)


async def test_between_processes():
    pair = Pair(Transport.DEVICE, LAYOUT, LAYOUT)
    fabric = JaxFabric("127.0.0.1", jax.devices()[0])
    receiver = NetKvReceiver(pair.identity("d", "f"), b"secret", pair.decode, pair.options(Transport.DEVICE), fabric)
    command = [sys.executable, "-m", "tests.kv_transfer.device_sender"]
    pipe = asyncio.subprocess.PIPE
    other = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        assert other.stdout
        port = int(await other.stdout.readline())
        receiver.request(PeerAddress("127.0.0.1", 0, port), pair.ticket("r", [1, 2, 5]))
        await until(lambda: pair.decode.done or pair.decode.failed)
        pair.check_blocks("r", [1, 2, 5])
        assert pair.decode.lost["r", 0] == []
    finally:
        await receiver.close()
        other.kill()
        await other.wait()


async def test_a_pull_that_never_ends_is_given_up_and_the_next_session_works(monkeypatch):
    """A number that nobody registered: jax itself would wait for ever."""
    monkeypatch.setattr(receiver_module, "PULL_S", 0.3)
    async with open_pair(Transport.DEVICE) as pair:
        fabric, offer = pair.sender.fabric, pair.sender.fabric.offer
        monkeypatch.setattr(fabric, "offer", lambda layers: (offer(layers)[0] ^ 1, offer(layers)[1]))
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        pair.sender.send_blocks("r", 0, [0], pair.layers([0]))
        await until(lambda: pair.decode.failed and pair.prefill.cancelled)
        error = pair.decode.failed["r", 0]
        assert isinstance(error, TransferTimeout) and error.retryable
        monkeypatch.setattr(fabric, "offer", offer)
        await hand_over(pair, "s", [0, 3])
        pair.check_blocks("s", [0, 3])


async def test_blocks_that_landed_otherwise_than_they_left_are_lost(monkeypatch):
    async with open_pair(Transport.DEVICE) as pair:
        offer = pair.sender.fabric.offer

        def damage(layers):
            number, digests = offer(layers)
            return number, (digests[0] ^ 1, *digests[1:])

        monkeypatch.setattr(pair.sender.fabric, "offer", damage)
        await hand_over(pair, "r", [0, 1])
        assert pair.decode.lost["r", 0] == [0, 1]
        assert not pair.decode.blocks
        await pair.check_nothing_held()


async def test_nothing_stays_registered():
    async with open_pair(Transport.DEVICE) as pair:
        fabric = pair.sender.fabric
        await hand_over(pair, "pulled", [0, 1, 2])
        await pair.check_nothing_held()
        assert not fabric._offered
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        await until(lambda: len(pair.prefill.tickets) == 2)
        await pair.hold()
        pair.sender.send_blocks("r", 0, [0], pair.layers([0]))
        await until(lambda: fabric._offered)
        pair.cut()
        await until(lambda: not fabric._offered)
        pair.release()


@pytest.mark.parametrize("reason", ["dtype", "page_size", "no fabric there", "no fabric here", "sealed"])
async def test_the_pair_agrees_on_another_transport_where_it_cannot_be(reason):
    """Bytes of another dtype or shape would be taken without a word."""
    change = {"dtype": {"dtype": "float32"}, "page_size": {"page_size": 8}}.get(reason, {})
    pair = Pair(Transport.DEVICE, LAYOUT, dataclasses.replace(LAYOUT, **change))
    options = dataclasses.replace(
        pair.options(Transport.DEVICE), transports=(Transport.DEVICE, Transport.TCP), encrypts=reason == "sealed"
    )
    fabrics = [JaxFabric("127.0.0.1", jax.devices()[0]) for _ in range(2)]
    here = None if reason == "no fabric here" else fabrics[0]
    there = None if reason == "no fabric there" else fabrics[1]
    pair.sender = NetKvSender(pair.identity("p", "f"), b"secret", pair.prefill, 1 << 30, options, here)
    pair.receiver = NetKvReceiver(pair.identity("d", "f"), b"secret", pair.decode, options, there)
    pair.address = PeerAddress("127.0.0.1", 0, await pair.sender.start("127.0.0.1", 0))
    try:
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        pair.sender.send_blocks("r", 0, range(2), pair.layers(range(2)))
        pair.sender.finish("r", 0, first_token("r"))
        await until(lambda: pair.decode.done)
        assert [link.transport for link in pair.sender.links] == [Transport.TCP]
    finally:
        await pair.receiver.close()
        await pair.sender.close()


def test_workers_do_not_offer_it():
    assert TransferOptions.of(TransferConfig(), None).transports == HOST_TRANSPORTS
    assert TransferOptions.of(TransferConfig(transport="tcp"), None).transports == (Transport.TCP,)
    with pytest.raises(ConfigError, match=r"transfer\.transport device is not for workers yet"):
        TransferConfig(transport="device")
    with pytest.raises(ConfigError, match=r"transfer\.transport must be auto, shared_memory or tcp, not 'rdma'"):
        TransferConfig(transport="rdma")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_every_bit_and_every_place_counts(dtype):
    item = jnp.dtype(dtype).itemsize
    unsigned = np.dtype(f"u{item}")
    rng = np.random.default_rng(0)
    layers = [rng.integers(0, 1 << 8 * item, (3, 4, 4, 8), unsigned, endpoint=False) for _ in range(2)]

    def digests() -> tuple[int, ...]:
        return block_digests([jnp.asarray(layer.view(jnp.dtype(dtype))) for layer in layers])

    before = digests()
    assert len(set(before)) == 3
    for layer in range(2):
        for bit in (0, 8 * item - 1):
            layers[layer][1, 3, 2, 5] ^= unsigned.type(1 << bit)
            after = digests()
            assert after[1] != before[1] and after[::2] == before[::2]
            assert (after[1] ^ before[1]) & 0xFFFFFFFF and (after[1] ^ before[1]) >> 32
            layers[layer][1, 3, 2, 5] ^= unsigned.type(1 << bit)
    layers[0][0], layers[1][0] = layers[1][0].copy(), layers[0][0].copy()
    assert digests()[0] != before[0]
    assert digests()[1:] == before[1:]
