"""Wire format, layout fingerprints, and hostile bytes on a KV connection."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.errors import ConfigError, ProtocolError
from engine_core.messages import PROTOCOL_VERSION, PeerAddress
from engine_core.models.spec import ModelSpec
from kv_transfer import tcp
from kv_transfer.auth import Side, make_proof
from kv_transfer.connection import KvConnection
from kv_transfer.layout import BlockLayout, fingerprint
from kv_transfer.tcp import TcpKvReceiver
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.wire import (
    LENGTH,
    KvAbort,
    KvBeat,
    KvBlocks,
    KvHello,
    TicketCancel,
    TicketMsg,
    as_layers,
    block_header,
    check_header,
    checksum,
    encode,
    from_decode,
    from_prefill,
    verified,
)
from tests.kv_transfer.test_transport import LAYOUT, DecodeEars, first_token, open_pair, until

TICKET = Ticket("r", 0, 1, (Landing(0, 100), Landing(1, 101)), 30_000)


def frame(layout: BlockLayout = LAYOUT) -> tuple[KvBlocks, bytearray]:
    payload = bytearray(np.random.default_rng(0).bytes(2 * layout.block_bytes))
    view, size = memoryview(payload), layout.layer_bytes
    pieces = [view[at : at + size] for at in range(0, len(view), size)]
    return block_header(TICKET, [(0, 100), (1, 101)], pieces, layout), payload


def test_a_frame_survives_and_its_arrays_lie_in_place():
    header, payload = frame()
    check_header(header, LAYOUT)
    assert verified(header, memoryview(payload), LAYOUT)
    layers = as_layers(memoryview(payload), 2, LAYOUT)
    assert len(layers) == LAYOUT.num_layers
    assert layers[1].shape == (2, *LAYOUT.shape)
    assert layers[1].tobytes() == payload[2 * LAYOUT.layer_bytes : 4 * LAYOUT.layer_bytes]
    assert from_prefill.decode(encode(header)[LENGTH.size :]) == header


@given(st.integers(0, 2 * LAYOUT.block_bytes - 1), st.integers(0, 7))
def test_every_bit_is_covered_by_a_checksum(at, bit):
    header, payload = frame()
    payload[at] ^= 1 << bit
    assert not verified(header, memoryview(payload), LAYOUT)


@pytest.mark.parametrize(
    "change",
    [{"request_id": "s"}, {"epoch": 1}, {"blocks": (1, 0)}, {"generations": (100, 102)}, {"checksums": (1, 2)}],
)
def test_the_checksum_covers_the_name(change):
    header, payload = frame()
    assert not verified(msgspec.structs.replace(header, **change), memoryview(payload), LAYOUT)


def test_names_do_not_run_into_each_other():
    assert checksum([], "r1", 1, 2, 3) != checksum([], "r", 11, 2, 3) != checksum([], "r", 1, 12, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": ()},
        {"blocks": (0, 0)},
        {"generations": (1,)},
        {"checksums": (1, 2, 3)},
        {"layers": (0, 2)},
        {"heads": (1, 2)},
        {"dtype": "float32"},
        {"num_bytes": 1},
        {"num_bytes": -1},
        {"num_bytes": 1 << 62},
    ],
    ids=str,
)
def test_headers_that_contradict_the_layout_are_refused(change):
    header, _ = frame()
    with pytest.raises(ProtocolError):
        check_header(msgspec.structs.replace(header, **change), LAYOUT)


def test_layouts_without_a_wire_form_are_refused():
    with pytest.raises(ConfigError, match="int8"):
        dataclasses.replace(LAYOUT, dtype="int8")


SPEC = ModelSpec(
    architecture="Qwen3ForCausalLM",
    num_layers=3,
    hidden_size=32,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=100,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    tie_embeddings=True,
    qk_norm=True,
    qkv_bias=False,
    sliding_window=(0, 0, 0),
    max_position=1024,
    eos_token_ids=(1,),
    dtype="bfloat16",
)


def test_fingerprints_differ_wherever_workers_may_not_pair():
    changes: list[tuple[Any, str, Any]] = [
        (SPEC, "main", LAYOUT),
        (dataclasses.replace(SPEC, rope_theta=5e5), "main", LAYOUT),
        (dataclasses.replace(SPEC, sliding_window=(0, 8, 0)), "main", LAYOUT),
        (SPEC, "other weights", LAYOUT),
        *((SPEC, "main", dataclasses.replace(LAYOUT, **{name: 5})) for name in ("page_size", "num_kv_heads")),
        (SPEC, "main", dataclasses.replace(LAYOUT, dtype="float32")),
    ]
    prints = {fingerprint(*change) for change in changes}
    assert len(prints) == len(changes)
    assert fingerprint(dataclasses.replace(SPEC), "main", dataclasses.replace(LAYOUT)) in prints
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)


def mutated(messages: list[bytes]) -> st.SearchStrategy[bytes]:
    def damage(message: bytes, at: int, value: int, keep: int) -> bytes:
        changed = bytearray(message)
        changed[at % len(changed)] = value
        return bytes(changed[: max(1, len(changed) - keep)])

    return st.builds(
        damage, st.sampled_from(messages), st.integers(0, 300), st.integers(0, 255), st.sampled_from([0, 0, 1, 9])
    )


HELLO = encode(KvHello(PROTOCOL_VERSION, "d", 1, "f", b"x" * 32, b"n" * 16))
UP = [HELLO, encode(TicketMsg(TICKET)), encode(TicketCancel("r", 0)), encode(KvBeat())]
DOWN = [encode(frame()[0]) + bytes(frame()[1]), encode(KvAbort("r", 0, 1, "overloaded", "x", True)), encode(KvBeat())]
GARBAGE = st.one_of(st.binary(max_size=300), st.binary(max_size=80).map(lambda body: LENGTH.pack(len(body)) + body))


async def hand_over(pair: Any, name: str) -> None:
    pair.sender.offer(name, 0, 30)
    pair.receiver.request(pair.address, pair.ticket(name, [0, 1]))
    pair.sender.send_blocks(name, 0, [0, 1], pair.layers([0, 1]))
    pair.sender.finish(name, 0, first_token(name))
    await until(lambda: (name, 0) in pair.decode.done)
    pair.check_blocks(name, [0, 1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(GARBAGE, mutated(UP)), min_size=1, max_size=4), st.booleans())
def test_a_sender_survives_hostile_callers(hostile, past_handshake):
    async def scenario():
        async with open_pair("tcp") as pair:
            await hand_over(pair, "before")
            reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
            size = LENGTH.unpack(await reader.readexactly(4))[0]
            nonce = from_prefill.decode(await reader.readexactly(size)).nonce
            if past_handshake:
                proof = make_proof(b"secret", Side.KV_CALLER, nonce, b"n" * 16)
                writer.write(encode(KvHello(PROTOCOL_VERSION, "evil", 1, "f", proof, b"n" * 16)))
            writer.write(b"".join(hostile))
            writer.write_eof()
            with contextlib.suppress(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 10)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            await hand_over(pair, "after")
            assert len(pair.sender.links) == 1
            assert not pair.decode.failed

    asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(GARBAGE, mutated(DOWN)), min_size=1, max_size=4), st.booleans())
def test_a_receiver_survives_a_hostile_prefill_worker(hostile, past_handshake):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            nonce = b"p" * 16
            if past_handshake:
                writer.write(encode(tcp.Challenge(nonce)))
                size = LENGTH.unpack(await reader.readexactly(4))[0]
                hello = from_decode.decode(await reader.readexactly(size))
                proof = make_proof(b"secret", Side.KV_LISTENER, nonce, hello.nonce)
                writer.write(encode(KvHello(PROTOCOL_VERSION, "evil", 1, "f", proof, b"")))
                size = LENGTH.unpack(await reader.readexactly(4))[0]
                await reader.readexactly(size)
            writer.write(b"".join(hostile))
            writer.write_eof()
            await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def scenario():
        async with open_pair("tcp") as pair:
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            pair.receiver.request(PeerAddress("127.0.0.1", 0, port), TICKET)
            await until(lambda: ("r", 0) in pair.decode.failed)
            await hand_over(pair, "other")
            server.close()
            received = pair.decode.blocks.get(("r", 0), {})
            for place, index in enumerate(sorted(received)):
                assert place == index
                for layer, expected in zip(received[index], as_layers(memoryview(frame()[1]), 2, LAYOUT), strict=True):
                    assert layer.tobytes() == expected[index].tobytes()
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


async def test_a_peer_that_falls_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(tcp, "SILENCE_S", 0.3)
    async with open_pair("tcp") as pair:
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        await until(lambda: pair.prefill.tickets)
        for link in pair.sender.links:
            pair.sender.loop.remove_reader(link.connection._socket)
            monkeypatch.setattr(link.connection, "send", lambda pieces: None)
            link.connection.heard_at += 100
        await until(lambda: pair.decode.failed)
        assert "said nothing" in str(pair.decode.failed["r", 0])


async def test_beats_keep_an_idle_connection(monkeypatch):
    monkeypatch.setattr(tcp, "SILENCE_S", 1.2)
    monkeypatch.setattr(tcp, "BEAT_S", 0.2)
    async with open_pair("tcp") as pair:
        await hand_over(pair, "a")
        link = next(iter(pair.sender.links))
        await asyncio.sleep(2.5)
        assert pair.sender.links == {link}


async def test_a_secret_that_differs_is_refused():
    async with open_pair("tcp") as pair:
        receiver = TcpKvReceiver(pair.identity("d", "f"), b"guess", ears := DecodeEars())
        receiver.request(pair.address, TICKET)
        await until(lambda: ears.failed)
        assert "secret" in str(ears.failed["r", 0])
        await receiver.close()


async def test_payload_is_received_aligned_into_fresh_memory():
    async with open_pair("tcp") as pair:
        await hand_over(pair, "a")
        await hand_over(pair, "b")
        starts = [pair.decode.blocks[name, 0][0][0].ctypes.data for name in ("a", "b")]
        assert all(start % 64 == 0 for start in starts)
        assert starts[0] != starts[1]


def test_a_closed_connection_takes_no_more():
    async def scenario() -> None:
        async with open_pair("tcp") as pair:
            await hand_over(pair, "a")
            connection: KvConnection = next(iter(pair.sender.links)).connection
            connection.close(ProtocolError("over"))
            connection.send([b"x"])
            assert connection.queued_bytes == 0
            connection.close(ProtocolError("again"))
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


async def read_message(reader: asyncio.StreamReader, decoder: Any) -> Any:
    size = LENGTH.unpack(await reader.readexactly(LENGTH.size))[0]
    return decoder.decode(await reader.readexactly(size))


async def test_the_listener_itself_refuses_another_layout():
    async with open_pair("tcp") as pair:
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
        challenge = await read_message(reader, from_prefill)
        proof = make_proof(b"secret", Side.KV_CALLER, challenge.nonce, b"n" * 16)
        writer.write(encode(KvHello(PROTOCOL_VERSION, "other", 1, "g", proof, b"n" * 16)))
        refused = await read_message(reader, from_prefill)
        assert refused.code == "layout_mismatch"
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_before_the_handshake_a_message_is_small():
    async with open_pair("tcp") as pair:
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
        await read_message(reader, from_prefill)
        writer.write(LENGTH.pack(tcp.HANDSHAKE_BYTES + 1))
        assert await asyncio.wait_for(reader.read(), 3) == b""
        writer.close()
        await writer.wait_closed()


async def test_an_absurd_size_is_refused_before_memory_is_taken_for_it():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(tcp.Challenge(b"p" * 16)))
        hello = await read_message(reader, from_decode)
        proof = make_proof(b"secret", Side.KV_LISTENER, b"p" * 16, hello.nonce)
        writer.write(encode(KvHello(PROTOCOL_VERSION, "evil", 1, "f", proof, b"")))
        await read_message(reader, from_decode)
        writer.write(encode(msgspec.structs.replace(frame()[0], num_bytes=1 << 45)))
        await reader.read()
        writer.close()

    async with open_pair("tcp") as pair:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        pair.receiver.request(PeerAddress("127.0.0.1", 0, server.sockets[0].getsockname()[1]), TICKET)
        await until(lambda: pair.decode.failed)
        assert "expected" in str(pair.decode.failed["r", 0])
        server.close()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("early", [TicketMsg(TICKET), TicketCancel("r", 0), KvBeat()])
async def test_nothing_is_heard_before_the_handshake(early):
    async with open_pair("tcp") as pair:
        pair.sender.offer("r", 0, 30)
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
        await read_message(reader, from_prefill)
        writer.write(encode(early))
        assert await asyncio.wait_for(reader.read(), 3) == b""
        assert not pair.prefill.tickets
        assert not pair.prefill.cancelled
        writer.close()
        await writer.wait_closed()


async def test_a_bug_of_the_worker_fails_the_request_and_not_the_transport():
    async with open_pair("tcp") as pair:
        logged: list[Any] = []
        pair.receiver.loop.set_exception_handler(lambda _, context: logged.append(context["exception"]))
        on_blocks, pair.decode.on_blocks = pair.decode.on_blocks, lambda *_: 1 / 0
        pair.receiver.request(pair.address, TICKET)
        pair.sender.offer("r", 0, 30)
        pair.sender.send_blocks("r", 0, [0, 1], pair.layers([0, 1]))
        await until(lambda: pair.decode.failed)
        assert isinstance(logged[0], ZeroDivisionError)
        pair.decode.on_blocks = on_blocks
        await hand_over(pair, "next")
