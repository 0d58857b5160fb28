"""Who says the wrong thing is refused: the reason is logged and counted, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec
import pytest

from engine_core.messages import PROTOCOL_VERSION, Cancel, Hello
from kv_transfer.auth import Side, make_proof
from kv_transfer.channel import from_worker
from kv_transfer.framing import HEAD, frame
from kv_transfer.wire import KV_PROTOCOL, KvHello, Transport, encode_body, from_prefill
from tests.kv_transfer.test_control import connected, served, until
from tests.kv_transfer.test_transport import LAYOUT, open_pair
from tests.kv_transfer.test_wire import hand_over, read_frame

NONCE = b"n" * 16


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("secret", "wrong_secret"),
        ("version", "wrong_protocol"),
        ("oversized", "protocol_error"),
        ("damaged", "protocol_error"),
        ("malformed", "protocol_error"),
    ],
)
async def test_a_gateway_that_is_refused(fault: str, code: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with served(b"secret") as (worker, server, address), connected(address, b"secret") as (_, good):
        await good.wait_connected()
        reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
        challenge = from_worker.decode(await read_frame(reader))
        secret = b"other" if fault == "secret" else b"secret"
        proof = make_proof(secret, Side.CONTROL_CALLER, challenge.nonce, NONCE)
        version = PROTOCOL_VERSION + (fault == "version")
        hello = frame(msgspec.msgpack.encode(Hello(version, "evil", None, proof, NONCE)), 0)
        writer.write(
            {
                "oversized": HEAD.pack(1 << 30, 0),
                "damaged": hello[:-1] + bytes([hello[-1] ^ 8]),
                "malformed": frame(b"\xc1", 0),
            }.get(fault, hello)
        )
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 3)
        writer.close()
        await until(lambda: server.refused)
        assert server.refused == {code: 1}
        assert any("refused gateway" in line or "hung up on gateway" in line for line in caplog.messages)
        good.send(Cancel("fine", 0))
        await until(lambda: worker.requests)
        assert not worker.lost


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("secret", "wrong_secret"),
        ("version", "wrong_protocol"),
        ("fingerprint", "layout_mismatch"),
        ("oversized", "protocol_error"),
        ("damaged", "protocol_error"),
        ("nonsense later", "protocol_error"),
    ],
)
async def test_a_decode_worker_that_is_refused(fault: str, code: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    refused: list[str] = []
    async with open_pair("tcp") as pair:
        pair.sender.on_refused = refused.append
        await hand_over(pair, "before")
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.address.kv_port)
        nonce = from_prefill.decode(await read_frame(reader)).nonce
        hello = KvHello(
            KV_PROTOCOL + (fault == "version"),
            "evil",
            1,
            "other" if fault == "fingerprint" else "f",
            make_proof(b"other" if fault == "secret" else b"secret", Side.KV_CALLER, nonce, NONCE),
            NONCE,
            LAYOUT.wire_fields,
            (Transport.TCP,),
            None,
            False,
            1 << 20,
            b"",
        )
        sent = frame(encode_body(hello), 0)
        if fault == "oversized":
            sent = HEAD.pack(1 << 30, 0)
        elif fault == "damaged":
            sent = sent[:-1] + bytes([sent[-1] ^ 8])
        elif fault == "nonsense later":
            sent += frame(encode_body(msgspec.structs.replace(hello)), 1)
        writer.write(sent)
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 3)
        writer.close()
        await until(lambda: refused)
        assert refused == [code]
        assert any("ended" in line for line in caplog.messages)
        await hand_over(pair, "after")
        assert not pair.decode.failed
