"""Below ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from router.http_protocol import HeadHolder
from tests.router.conftest import Cluster, run_cluster

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Recorder:
    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.writes.append(b"closed")

    def is_closing(self) -> bool:
        return False

    pause_reading = resume_reading = is_closing


async def test_a_head_leaves_with_what_follows_it() -> None:
    recorder = Recorder()
    holder = HeadHolder(cast(asyncio.Transport, recorder))
    holder.write(HEAD)
    assert recorder.writes == []
    holder.write(b"ab")
    holder.write(b"cd")
    assert recorder.writes == [HEAD + b"ab", b"cd"]
    holder.write(HEAD)
    await asyncio.sleep(0)
    assert recorder.writes[2:] == [HEAD]
    holder.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert len(recorder.writes) == 4
    holder.write(HEAD)
    holder.close()
    assert recorder.writes[4:] == [HEAD, b"closed"]


@pytest.fixture
async def address(model_dir: Path, answer_ids: list[int]) -> AsyncIterator[Cluster]:
    async with run_cluster(model_dir, answer_ids) as running:
        yield running


async def exchange(cluster: Cluster, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.gateway.port)
    writer.write(sent)
    async with asyncio.timeout(5):
        received = await reader.read()
    writer.close()
    return received


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"nonsense\r\n\r\n", b"400", b"invalid_http"),
        (b"GET /health HTTP/1.1\r\nx: " + b"a" * 66_000, b"431", b"headers_too_large"),
        (b"GET /" + b"a" * 66_000, b"431", b"headers_too_large"),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n", b"400", b"invalid_http"),
        (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 300000000\r\n\r\n{}",
            b"413",
            b"request_too_large",
        ),
    ],
)
async def test_bad_http(address: Cluster, sent: bytes, status: bytes, code: bytes) -> None:
    received = await exchange(address, sent)
    assert received.startswith(b"HTTP/1.1 " + status), received
    assert b'{"error":' in received
    assert code in received


async def test_head_and_pipelining_and_continue(address: Cluster) -> None:
    body = b'{"model":"demo","prompt":"x","max_tokens":1}'
    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n" % len(body)
    both = post + b"\r\n" + body + post + b"connection: close\r\n\r\n" + body
    assert (await exchange(address, both)).count(b"HTTP/1.1 200") == 2
    received = await exchange(address, b"HEAD /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 405")
    expecting = post + b"connection: close\r\nexpect: 100-continue\r\n\r\n" + body
    received = await exchange(address, expecting)
    assert received.startswith(b"HTTP/1.1 100")
    assert b"HTTP/1.1 200" in received
