"""A worker's control server and a gateway's client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine_core.errors import BatonError, ConfigError, ProtocolError, WorkerDied
from engine_core.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Failed,
    Hello,
    Load,
    PeerAddress,
    Prefill,
    TokenChunk,
    Tokens,
    WorkerInfo,
)
from engine_core.types import Numerics, Request, Role, SamplingParams
from kv_transfer import control
from kv_transfer.channel import Channel, from_worker
from kv_transfer.control import ControlClient, ControlServer, GatewayLink

LOAD = Load(1, 2, 3, 4, False, 0)


def info(port: int = 0, incarnation: int = 1) -> WorkerInfo:
    return WorkerInfo(
        "w", incarnation, Role.DECODE, PeerAddress("127.0.0.1", port, 9), "f", Numerics.FAST, 8, 64, 16, 1024
    )


class Worker:
    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.links: list[GatewayLink] = []
        self.lost: list[str] = []

    def on_request(self, link: GatewayLink, message: Any) -> None:
        self.requests.append(message)
        self.links.append(link)

    def on_gateway_lost(self, link: GatewayLink) -> None:
        self.lost.append(link.peer)


class Gateway:
    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.infos: list[WorkerInfo] = []
        self.lost: list[BatonError] = []

    def on_connected(self, client: ControlClient, info: WorkerInfo) -> None:
        self.infos.append(info)

    def on_tokens(self, client: ControlClient, message: Tokens) -> None:
        self.heard.append(message)

    on_failed = on_load = on_tokens

    def on_lost(self, client: ControlClient, error: BatonError) -> None:
        self.lost.append(error)


@asynccontextmanager
async def served(secret: bytes | None = None, port: int = 0, incarnation: int = 1) -> AsyncIterator[Any]:
    worker = Worker()
    server = ControlServer(secret, worker)
    address = (await server.start("127.0.0.1", info(port, incarnation))).address
    try:
        yield worker, server, address
    finally:
        await server.close()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def connected(address: PeerAddress, secret: bytes | None = None) -> AsyncIterator[Any]:
    gateway = Gateway()
    client = ControlClient(address, "g1", secret, gateway)
    client.start()
    try:
        yield gateway, client
    finally:
        await client.close()
        await asyncio.sleep(0)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("secret", [None, b"swordfish"])
async def test_requests_go_up_and_answers_come_back_on_their_link(secret):
    async with served(secret) as (worker, server, address), connected(address, secret) as (gateway, client):
        told = await asyncio.wait_for(client.wait_connected(), 10)
        assert told == info(address.port)
        request = Prefill(Request("r", list(range(1000)), 1000, SamplingParams(temperature=0)), 5000)
        assert client.send(request)
        client.send(Cancel("r", 0))
        await until(lambda: worker.requests == [request, Cancel("r", 0)])
        assert worker.links[0].peer == "g1"
        answers = [Tokens([TokenChunk("r", 0, 0, [1])]), Failed("r", 0, "internal_error", "x", False)]
        for answer in answers:
            worker.links[0].send(answer)
        server.broadcast(LOAD)
        await until(lambda: gateway.heard == [*answers, LOAD])
    assert worker.lost == ["g1"]
    assert gateway.lost == []


async def test_a_newcomer_hears_the_latest_load():
    async with served() as (_, server, address):
        server.broadcast(LOAD)
        async with connected(address) as (gateway, _):
            await until(lambda: gateway.heard == [LOAD])


@pytest.mark.parametrize(("ours", "theirs"), [(b"a", b"b"), (b"a", None), (None, b"b")])
async def test_secrets_that_differ_never_connect(ours, theirs):
    async with served(ours) as (worker, server, address), connected(address, theirs) as (gateway, client):
        await until(lambda: client.error)
        assert "secret" in str(client.error)
        assert not gateway.infos
        assert not gateway.lost
        assert not server.links
        with pytest.raises(WorkerDied):
            client.send(Cancel("r", 0))
        assert not worker.requests


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "example.org"])
async def test_without_a_secret_only_loopback(host):
    with pytest.raises(ConfigError, match="loopback"):
        await ControlServer(None, Worker()).start(host, info())


async def test_an_empty_secret_is_a_mistake():
    with pytest.raises(ConfigError, match="empty"):
        await ControlServer(b"", Worker()).start("127.0.0.1", info())


async def test_a_taken_port_is_a_config_error():
    async with served() as (_, _, address):
        with pytest.raises(ConfigError, match="cannot listen"):
            await ControlServer(None, Worker()).start("127.0.0.1", info(address.port))


async def test_a_restarted_worker_is_found_again_as_another_incarnation():
    async with served() as (_, _, address):
        gateway = Gateway()
        client = ControlClient(address, "g1", None, gateway)
        client.start()
        await asyncio.wait_for(client.wait_connected(), 10)
    await until(lambda: gateway.lost)
    assert isinstance(gateway.lost[0], WorkerDied)
    with pytest.raises(WorkerDied):
        client.send(Cancel("r", 0))
    await until(lambda: isinstance(client.error, WorkerDied) and "cannot connect" in str(client.error))
    async with served(port=address.port, incarnation=2):
        told = await asyncio.wait_for(client.wait_connected(), 10)
        assert told.incarnation == 2
        assert [heard.incarnation for heard in gateway.infos] == [1, 2]
        await client.close()


class Stranger:
    """Speaks the framing but not the manners."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.closed = asyncio.Event()
        self.channel = Channel(
            from_worker, lambda _: None, lambda _, message: self.heard.append(message), lambda *_: self.closed.set()
        )

    async def connect(self, address: PeerAddress) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self.channel, address.host, address.port)
        await until(lambda: self.heard)


@pytest.mark.parametrize(
    "opening",
    [
        Cancel("r", 0),
        Hello(PROTOCOL_VERSION + 1, "g"),
        Hello(PROTOCOL_VERSION, "g"),
        Hello(PROTOCOL_VERSION, "g", None, b"x" * 32, b"y" * 16),
        Hello(PROTOCOL_VERSION, "g" * 5000, None, b"x" * 32, b"y" * 16),
    ],
    ids=["no hello", "other version", "no proof", "wrong proof", "huge"],
)
async def test_bad_manners_are_shown_out(opening):
    async with served(b"secret") as (worker, server, address), connected(address, b"secret") as (_, client):
        await client.wait_connected()
        stranger = Stranger()
        await stranger.connect(address)
        stranger.channel.send(opening)
        stranger.channel.send(Cancel("r", 0))
        await asyncio.wait_for(stranger.closed.wait(), 10)
        assert len(server.links) == 1
        client.send(Cancel("still fine", 0))
        await until(lambda: worker.requests == [Cancel("still fine", 0)])


async def test_a_silent_stranger_is_shown_out(monkeypatch):
    monkeypatch.setattr(control, "HANDSHAKE_TIMEOUT_S", 0.05)
    async with served() as (_, server, address):
        stranger = Stranger()
        await stranger.connect(address)
        await asyncio.wait_for(stranger.closed.wait(), 10)
        assert not server._channels


async def test_a_gateway_that_answers_no_beat_is_hung_up_on(monkeypatch):
    """One whose kernel still takes everything, as that of a frozen process does; others stay."""
    monkeypatch.setattr(control, "SILENT_BEATS", 3)
    async with served() as (worker, server, address), connected(address) as (gateway, client):
        await client.wait_connected()
        frozen = Stranger()
        await frozen.connect(address)
        proof = control.make_proof(None, control.Side.CONTROL_CALLER, frozen.heard[0].nonce, b"n" * 16)
        frozen.channel.send(Hello(PROTOCOL_VERSION, "frozen", None, proof, b"n" * 16))
        await until(lambda: len(server.links) == 2)
        for _ in range(5):
            server.watch()
        assert len(server.links) == 2, "nothing was asked"
        for count in range(1, 5):
            assert not worker.lost
            server.broadcast(LOAD)
            await until(lambda count=count: len(gateway.heard) == count)
            await asyncio.sleep(0.01)
            server.watch()
        await asyncio.wait_for(frozen.closed.wait(), 10)
        assert worker.lost == ["frozen"]
        client.send(Cancel("still fine", 0))
        await until(lambda: worker.requests == [Cancel("still fine", 0)])


async def test_a_proof_of_one_connection_is_worthless_on_another():
    async with served(b"secret") as (_, server, address):
        spy = Stranger()
        await spy.connect(address)
        nonce = spy.heard[0].nonce
        proof = control.make_proof(b"secret", control.Side.CONTROL_CALLER, nonce, b"n" * 16)
        thief = Stranger()
        await thief.connect(address)
        thief.channel.send(Hello(PROTOCOL_VERSION, "g", None, proof, b"n" * 16))
        await asyncio.wait_for(thief.closed.wait(), 10)
        assert not server.links
        spy.channel.abort(ProtocolError("over"))
        await spy.closed.wait()
