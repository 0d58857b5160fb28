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
from engine_core.messages import Challenge, PeerAddress
from engine_core.models.spec import ModelSpec
from kv_transfer import beats, handshake
from kv_transfer.arena import Segment, SegmentRef
from kv_transfer.auth import Side, make_proof
from kv_transfer.blocks import as_layers, as_rows, block_header, is_intact, named, payload_rows
from kv_transfer.connection import KvConnection
from kv_transfer.digester import PlainDigester
from kv_transfer.framing import HEAD
from kv_transfer.framing import frame as framed
from kv_transfer.layout import BlockLayout, fingerprint
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.wire import (
    HOST_TRANSPORTS,
    KV_PROTOCOL,
    KvAbort,
    KvBeat,
    KvBlocks,
    KvHello,
    KvRelease,
    KvSegment,
    KvWant,
    KvWelcome,
    Place,
    TicketCancel,
    TicketMsg,
    Transport,
    check_header,
    encode_body,
    from_decode,
    from_prefill,
)
from tests.kv_transfer.test_transport import (
    ALL_TRANSPORTS,
    ARENA_BYTES,
    LAYOUT,
    DecodeEars,
    first_token,
    open_pair,
    until,
)

TICKET = Ticket("r", 0, 1, (Landing(0, 100), Landing(1, 101)), 30_000)


def encode(message: msgspec.Struct, number: int = 0) -> bytes:
    """As message `number` of a connection."""
    return framed(encode_body(message), number)


def in_order(pieces: list[bytes], first: int) -> bytes:
    """Those that are frames get the check that belongs to their place."""
    sent = b""
    for number, piece in enumerate(pieces, first):
        if len(piece) >= HEAD.size and HEAD.unpack_from(piece)[0] <= len(piece) - HEAD.size:
            end = HEAD.size + HEAD.unpack_from(piece)[0]
            piece = framed(piece[HEAD.size : end], number) + piece[end:]
        sent += piece
    return sent


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    size, _ = HEAD.unpack(await reader.readexactly(HEAD.size))
    return await reader.readexactly(size)


def frame(layout: BlockLayout = LAYOUT) -> tuple[KvBlocks, np.ndarray]:
    payload = np.random.default_rng(0).integers(0, 256, 2 * layout.block_bytes, np.uint8)
    blocks = [(0, 100), (1, 101)]
    sums = named(digests_of(payload, layout), TICKET.key, blocks)
    return block_header(TICKET, blocks, sums, layout, 0, None), payload


def digests_of(payload: np.ndarray, layout: BlockLayout) -> tuple[int, ...]:
    return PlainDigester().reader(payload_rows(payload, 2, layout)).digests([0, 1])


def intact(header: KvBlocks, payload: np.ndarray) -> bool:
    return is_intact(header, digests_of(payload, LAYOUT))


def test_a_frame_survives_and_its_arrays_lie_in_place():
    header, payload = frame()
    check_header(header, LAYOUT)
    assert intact(header, payload)
    layers = as_layers(payload_rows(payload, 2, LAYOUT), LAYOUT)
    assert len(layers) == LAYOUT.num_layers
    assert layers[1].shape == (2, *LAYOUT.shape)
    assert np.shares_memory(layers[1], payload) and not layers[1].flags.writeable
    assert layers[1].tobytes() == payload[2 * LAYOUT.layer_bytes : 4 * LAYOUT.layer_bytes].tobytes()
    rows = as_rows(layers, 2, LAYOUT)
    assert all(np.shares_memory(row, payload) for row in rows)
    assert from_prefill.decode(encode_body(header)) == header


@given(st.integers(0, 2 * LAYOUT.block_bytes - 1), st.integers(0, 7))
def test_every_bit_is_covered_by_a_checksum(at, bit):
    header, payload = frame()
    payload[at] ^= 1 << bit
    assert not intact(header, payload)


@pytest.mark.parametrize(
    "change",
    [{"request_id": "s"}, {"epoch": 1}, {"blocks": (1, 0)}, {"generations": (100, 102)}, {"checksums": (1, 2)}],
)
def test_the_checksum_covers_the_name(change):
    header, payload = frame()
    assert not intact(msgspec.structs.replace(header, **change), payload)


def test_names_do_not_run_into_each_other():
    names = [(("r1", 1), (2, 3)), (("r", 11), (2, 3)), (("r", 1), (12, 3)), (("r", 1), (1, 23))]
    assert len({named([42], key, [block]) for key, block in names}) == len(names)


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
        {"place": Place(1, 0, 0)},
        {"place": Place(1, 0, 2 * LAYOUT.layer_bytes - 1)},
        {"place": Place(1, 0, -(1 << 40))},
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
    moe=None,
)


def test_fingerprints_differ_wherever_workers_may_not_pair():
    changes: list[tuple[Any, str, Any]] = [
        (SPEC, "main", LAYOUT),
        (dataclasses.replace(SPEC, rope_theta=5e5), "main", LAYOUT),
        (dataclasses.replace(SPEC, sliding_window=(0, 8, 0)), "main", LAYOUT),
        (SPEC, "other weights", LAYOUT),
        *((SPEC, "main", dataclasses.replace(LAYOUT, **{name: 5})) for name in ("num_kv_heads", "head_dim")),
    ]
    prints = {fingerprint(*change) for change in changes}
    assert len(prints) == len(changes)
    for same in ({}, {"page_size": 128}, {"dtype": "float32"}):
        assert fingerprint(dataclasses.replace(SPEC), "main", dataclasses.replace(LAYOUT, **same)) in prints
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)


def mutated(messages: list[bytes]) -> st.SearchStrategy[bytes]:
    def damage(message: bytes, at: int, value: int, keep: int) -> bytes:
        changed = bytearray(message)
        changed[at % len(changed)] = value
        return bytes(changed[: max(1, len(changed) - keep)])

    return st.builds(
        damage, st.sampled_from(messages), st.integers(0, 300), st.integers(0, 255), st.sampled_from([0, 0, 1, 9])
    )


def hello(
    proof: bytes = b"x" * 32,
    worker_id: str = "evil",
    fingerprint: str = "f",
    transports: tuple[str, ...] = (Transport.TCP,),
    probe: SegmentRef | None = None,
    session: bytes = b"",
    layout: tuple = LAYOUT.wire_fields,
) -> bytes:
    return encode(
        KvHello(
            KV_PROTOCOL, worker_id, 1, fingerprint, proof, b"n" * 16, layout, transports, probe, False, 1 << 20, session
        )
    )


def welcome(secret: bytes, nonce: bytes, transport: str) -> bytes:
    """Behind a challenge."""
    proof = make_proof(secret, Side.KV_LISTENER, b"p" * 16, nonce)
    return encode(KvWelcome(KV_PROTOCOL, "evil", 1, "f", proof, transport, False, b"s" * 16), 1)


UP = [
    hello(),
    encode(TicketMsg(TICKET)),
    encode(TicketCancel("r", 0)),
    encode(KvWant("r", 0, 1, (0, 1))),
    encode(KvRelease((0, 1))),
    encode(KvBeat()),
]
PLACED = msgspec.structs.replace(frame()[0], place=Place(1, 0, 2 * LAYOUT.layer_bytes))
DOWN = [
    encode(frame()[0]) + frame()[1].tobytes(),
    encode(KvAbort("r", 0, 1, "overloaded", "x", True)),
    encode(KvBeat()),
    encode(PLACED),
    encode(KvSegment(1, SegmentRef("/proc/self/fd/0", 1 << 20, b"t" * 16))),
]
GARBAGE = st.one_of(st.binary(max_size=300), st.binary(max_size=80).map(lambda body: framed(body, 0)))


async def hand_over(pair: Any, name: str, seed: int = 0) -> None:
    pair.sender.offer(name, 0, 30)
    pair.receiver.request(pair.address, pair.ticket(name, [0, 1]))
    pair.sender.send_blocks(name, 0, [0, 1], pair.layers([0, 1], seed))
    pair.sender.finish(name, 0, first_token(name))
    await until(lambda: (name, 0) in pair.decode.done)
    pair.check_blocks(name, [0, 1], seed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(GARBAGE, mutated(UP)), min_size=1, max_size=4), st.booleans())
def test_a_sender_survives_hostile_callers(hostile, past_handshake):
    async def scenario():
        async with open_pair("tcp") as pair:
            await hand_over(pair, "before")
            reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
            nonce = from_prefill.decode(await read_frame(reader)).nonce
            if past_handshake:
                proof = make_proof(b"secret", Side.KV_CALLER, nonce, b"n" * 16)
                writer.write(hello(proof))
            writer.write(in_order(hostile, int(past_handshake)))
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
@given(st.lists(st.one_of(GARBAGE, mutated(DOWN)), min_size=1, max_size=4), st.booleans(), st.sampled_from(Transport))
def test_a_receiver_survives_a_hostile_prefill_worker(hostile, past_handshake, transport):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            nonce = b"p" * 16
            if past_handshake:
                writer.write(encode(Challenge(nonce)))
                caller = from_decode.decode(await read_frame(reader))
                writer.write(welcome(b"secret", caller.nonce, transport))
                await read_frame(reader)
            writer.write(in_order(hostile, 2 * past_handshake))
            writer.write_eof()
            await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def scenario():
        async with open_pair(transport) as pair:
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            pair.receiver.request(PeerAddress("127.0.0.1", 0, port), TICKET)
            await until(lambda: ("r", 0) in pair.decode.failed)
            await hand_over(pair, "other")
            server.close()
            received = pair.decode.blocks.get(("r", 0), {})
            for place, index in enumerate(sorted(received)):
                assert place == index
                for layer, expected in zip(
                    received[index], as_layers(payload_rows(frame()[1], 2, LAYOUT), LAYOUT), strict=True
                ):
                    assert layer.tobytes() == expected[index].tobytes()
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


async def test_a_peer_that_falls_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(beats, "SILENCE_S", 0.3)
    async with open_pair("tcp") as pair:
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        await until(lambda: pair.prefill.tickets)
        for link in pair.sender.links:
            pair.sender.loop.remove_reader(link.main._socket)
            monkeypatch.setattr(link.main, "send", lambda message: None)
            link.main.heard_at += 100
        await until(lambda: pair.decode.failed)
        assert "said nothing" in str(pair.decode.failed["r", 0])


async def test_beats_keep_an_idle_connection(monkeypatch):
    monkeypatch.setattr(beats, "SILENCE_S", 1.2)
    monkeypatch.setattr(beats, "BEAT_S", 0.2)
    async with open_pair("tcp") as pair:
        await hand_over(pair, "a")
        link = next(iter(pair.sender.links))
        await asyncio.sleep(2.5)
        assert pair.sender.links == {link}


async def test_a_secret_that_differs_is_refused():
    async with open_pair("tcp") as pair:
        receiver = NetKvReceiver(pair.identity("d", "f"), b"guess", ears := DecodeEars(), ALL_TRANSPORTS)
        receiver.request(pair.address, TICKET)
        await until(lambda: ears.failed)
        assert "secret" in str(ears.failed["r", 0])
        await receiver.close()


@pytest.mark.parametrize("kind", HOST_TRANSPORTS)  # a device's memory is its allocator's
async def test_memory_that_somebody_holds_is_not_used_again(kind):
    async with open_pair(kind) as pair:
        await hand_over(pair, "a")
        first = pair.decode.blocks["a", 0][0][0]
        await hand_over(pair, "b", seed=1)
        second = pair.decode.blocks["b", 0][0][0]
        assert first.ctypes.data % 64 == second.ctypes.data % 64 == 0
        assert not np.shares_memory(first, second)
        pair.check_blocks("a", [0, 1])
        place = first.ctypes.data
        del first, second
        await pair.check_nothing_held()
        await hand_over(pair, "c", seed=2)
        assert pair.decode.blocks["c", 0][0][0].ctypes.data == place, "memory that nobody holds is used again"


def test_a_closed_connection_takes_no_more():
    async def scenario() -> None:
        async with open_pair("tcp") as pair:
            await hand_over(pair, "a")
            connection: KvConnection = next(iter(pair.sender.links)).main
            connection.close(ProtocolError("over"))
            connection.send(KvBeat())
            assert connection.queued_bytes == 0
            connection.close(ProtocolError("again"))
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


async def read_message(reader: asyncio.StreamReader, decoder: Any) -> Any:
    return decoder.decode(await read_frame(reader))


async def test_the_listener_itself_refuses_another_layout():
    async with open_pair("tcp") as pair:
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
        challenge = await read_message(reader, from_prefill)
        proof = make_proof(b"secret", Side.KV_CALLER, challenge.nonce, b"n" * 16)
        writer.write(hello(proof, "other", "g"))
        refused = await read_message(reader, from_prefill)
        assert refused.code == "layout_mismatch"
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("layout", "code"),
    [
        ((3, 4, 2, 9, "bfloat16"), "layout_mismatch"),
        ((2, 4, 2, 8, "bfloat16"), "layout_mismatch"),
        ((3, 4, 2, 8, "int3"), "protocol_error"),
        ((3, 0, 2, 8, "bfloat16"), "protocol_error"),
        ((3, 1 << 60, 2, 8, "bfloat16"), "protocol_error"),
    ],
)
async def test_a_layout_that_ours_cannot_be_made_into_is_refused(layout, code):
    async with open_pair("tcp") as pair:
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
        challenge = await read_message(reader, from_prefill)
        proof = make_proof(b"secret", Side.KV_CALLER, challenge.nonce, b"n" * 16)
        writer.write(hello(proof, layout=layout))
        assert (await read_message(reader, from_prefill)).code == code
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_before_the_handshake_a_message_is_small():
    async with open_pair("tcp") as pair:
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
        await read_message(reader, from_prefill)
        writer.write(HEAD.pack(handshake.HANDSHAKE_BYTES + 1, 0))
        assert await asyncio.wait_for(reader.read(), 3) == b""
        writer.close()
        await writer.wait_closed()


async def test_an_absurd_size_is_refused_before_memory_is_taken_for_it():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(Challenge(b"p" * 16)))
        caller = await read_message(reader, from_decode)
        writer.write(welcome(b"secret", caller.nonce, Transport.TCP))
        await read_message(reader, from_decode)
        writer.write(encode(msgspec.structs.replace(frame()[0], num_bytes=1 << 45), 2))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with open_pair("tcp") as pair:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        pair.receiver.request(PeerAddress("127.0.0.1", 0, server.sockets[0].getsockname()[1]), TICKET)
        await until(lambda: pair.decode.failed)
        assert "expected" in str(pair.decode.failed["r", 0])
        server.close()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("damage", ["flip", "twice", "gap"])
async def test_messages_that_are_damaged_or_out_of_order_end_their_connection(damage):
    async with open_pair("tcp") as pair:
        await hand_over(pair, "before")
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
        nonce = (await read_message(reader, from_prefill)).nonce
        writer.write(hello(make_proof(b"secret", Side.KV_CALLER, nonce, b"n" * 16)))
        await read_message(reader, from_prefill)
        ticket = encode(TicketMsg(TICKET), 2 if damage == "gap" else 1)
        writer.write(ticket[:-3] + bytes([ticket[-3] ^ 4]) + ticket[-2:] if damage == "flip" else ticket)
        if damage == "twice":
            writer.write(ticket)
        assert await asyncio.wait_for(reader.read(), 3) == b""
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        await hand_over(pair, "after")


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


@pytest.mark.parametrize(
    ("offered", "probe", "chosen"),
    [
        ((Transport.SHARED_MEMORY, Transport.TCP), "right", Transport.SHARED_MEMORY),
        ((Transport.TCP, Transport.SHARED_MEMORY), "right", Transport.TCP),
        ((Transport.SHARED_MEMORY, Transport.TCP), "none", Transport.TCP),
        ((Transport.SHARED_MEMORY, Transport.TCP), "other host", Transport.TCP),
        ((Transport.SHARED_MEMORY, Transport.TCP), "no segment", Transport.TCP),
        (("carrier pigeon", Transport.TCP), "right", Transport.TCP),
        (("carrier pigeon",), "right", None),
        ((Transport.SHARED_MEMORY,), "none", None),
    ],
)
def test_the_transport_is_the_best_of_decode_that_prefill_can_do(offered, probe, chosen):
    segment = Segment.create(64)
    refs = {
        "right": segment.ref,
        "none": None,
        "other host": SegmentRef(segment.ref.path, 64, b"?" * 16),
        "no segment": SegmentRef("/proc/self/exe", 64, b"?" * 16),
    }
    message = from_decode.decode(hello(transports=offered, probe=refs[probe])[HEAD.size :])
    if chosen is None:
        with pytest.raises(ProtocolError, match="no transport in common"):
            handshake.choose(message, tuple(Transport))
    else:
        assert handshake.choose(message, tuple(Transport)) is chosen


async def test_memory_that_cannot_be_mapped_after_all_ends_in_tcp(monkeypatch):
    async with open_pair(Transport.SHARED_MEMORY) as pair:
        pair.receiver.options = pair.sender._options = ALL_TRANSPORTS
        really_open = Segment.open

        def only_probes(ref):
            if ref.num_bytes >= ARENA_BYTES:
                raise FileNotFoundError(ref.path)
            return really_open(ref)

        monkeypatch.setattr(Segment, "open", only_probes)
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, TICKET)
        pair.sender.send_blocks("r", 0, [0, 1], pair.layers([0, 1]))
        await until(lambda: pair.decode.failed)
        assert pair.decode.failed["r", 0].retryable
        await hand_over(pair, "next")
        (link,) = pair.sender.links
        assert link.transport is Transport.TCP


async def test_what_a_lost_reader_may_still_read_is_never_written_again():
    async with open_pair(Transport.SHARED_MEMORY) as pair:
        await hand_over(pair, "a")
        first = pair.sender.own_memory.arena
        held = pair.decode.blocks["a", 0][0][0]
        expected = held.tobytes()
        pair.cut()
        await until(lambda: not pair.sender.links)
        for number in range(8):
            await hand_over(pair, f"b{number}", seed=number + 1)
        assert pair.sender.own_memory.arena is not first
        assert held.tobytes() == expected


async def test_a_session_takes_connections_of_its_own_worker_only():
    async with open_pair("tcp") as pair:
        await hand_over(pair, "a")
        (link,) = pair.sender.links
        for session, worker_id in ((link.session, "evil"), (b"?" * 16, "d")):
            reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
            challenge = await read_message(reader, from_prefill)
            proof = make_proof(b"secret", Side.KV_CALLER, challenge.nonce, b"n" * 16)
            writer.write(hello(proof, worker_id, session=session))
            assert "no such session" in (await read_message(reader, from_prefill)).message
            writer.close()
            await writer.wait_closed()
        assert pair.sender.links == {link}
        await hand_over(pair, "b")
