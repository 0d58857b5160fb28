"""Below ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from router.http_protocol import HttpProtocol, close_idle
from tests.router.conftest import Cluster, run_cluster

GET = b"GET /a%20b?c=d HTTP/1.1\r\nhost: x\r\n\r\n"


class Recorder:
    """A transport."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> None:
        return None

    pause_reading = resume_reading = is_closing


def connect(app: ASGIApp) -> tuple[HttpProtocol, Recorder]:
    """A connection to an application."""
    recorder = Recorder()
    protocol = HttpProtocol(uvicorn.Config(app, lifespan="off", log_config=None), ServerState(), {})  # type: ignore[arg-type]
    protocol.connection_made(recorder)  # type: ignore[arg-type]
    return protocol, recorder


def start(*headers: tuple[bytes, bytes], status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(content: bytes, more_body: bool = False) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more_body}


async def answer_to(request: bytes, *messages: Message) -> Recorder:
    """What an application that sends these messages has written, after a few rounds of the loop."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
            await asyncio.sleep(0)

    protocol, recorder = connect(app)
    protocol.data_received(request)
    for _ in range(20):
        await asyncio.sleep(0)
    return recorder


async def test_a_head_leaves_with_what_follows_it() -> None:
    recorder = await answer_to(GET, start((b"content-length", b"4")), body(b"ab", True), body(b"cd"))
    assert recorder.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab", b"cd"]
    recorder = await answer_to(GET, start(), body(b"ab", True), body(b""))
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    assert recorder.writes == [head + b"2\r\nab\r\n", b"0\r\n\r\n"]
    recorder = await answer_to(GET.replace(b"GET", b"HEAD"), start((b"content-length", b"4")), body(b"abcd"))
    assert recorder.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"]
    recorder = await answer_to(GET, start(status=204), body(b""))
    assert recorder.writes == [b"HTTP/1.1 204 No Content\r\n\r\n"]


async def test_a_connection_ends_where_either_side_wants_it() -> None:
    closing = GET.replace(b"host: x", b"host: x\r\nconnection: close")
    recorder = await answer_to(closing, start((b"content-length", b"2")), body(b"ab"))
    assert recorder.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nab"]
    assert recorder.closed
    recorder = await answer_to(GET, start((b"content-length", b"2"), (b"connection", b"Close")), body(b"ab"))
    assert recorder.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: Close\r\n\r\nab"]
    assert recorder.closed


@pytest.mark.parametrize(
    "messages",
    [
        (body(b"ab"),),
        (start((b"x", b"a\r\nb: c")), body(b"")),
        (start((b"x", b"a\nb: c")), body(b"")),
        (start(), start()),
    ],
)
async def test_an_application_that_errs_before_its_first_bytes(
    messages: tuple[Message, ...], caplog: pytest.LogCaptureFixture
) -> None:
    recorder = await answer_to(GET, *messages)
    assert recorder.closed or recorder.writes[0].startswith(b"HTTP/1.1 500")
    assert b"b: c" not in b"".join(recorder.writes)
    assert "Exception in ASGI application" in caplog.text


async def test_a_body_of_another_length_ends_the_connection() -> None:
    for content in (b"a", b"abc"):
        recorder = await answer_to(GET, start((b"content-length", b"2")), body(content))
        assert (recorder.writes, recorder.closed) == ([], True)


async def test_what_an_application_sees() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await send(start())
        await send(body(b""))

    protocol, _ = connect(app)
    protocol.data_received(GET)
    await asyncio.sleep(0)
    scope = seen[0]
    assert (scope["method"], scope["path"], scope["raw_path"]) == ("GET", "/a b", b"/a%20b")
    assert (scope["query_string"], scope["http_version"], scope["headers"]) == (b"c=d", "1.1", [(b"host", b"x")])


async def test_idle_connections_are_closed_and_no_others() -> None:
    now = asyncio.get_running_loop().time()
    may_answer = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await may_answer.wait()
        await send(start())
        await send(body(b""))

    protocol, recorder = connect(app)
    close_idle([protocol], now + 1000)
    protocol.data_received(GET)
    await asyncio.sleep(0)
    close_idle([protocol], now + 1000)
    assert not recorder.closed
    may_answer.set()
    for _ in range(5):
        await asyncio.sleep(0)
    close_idle([protocol], now)
    assert not recorder.closed
    close_idle([protocol], now + 1000)
    assert recorder.closed


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


async def test_a_gateway_hangs_up_on_idle_clients(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, keep_alive_s=1) as cluster:
        assert (await exchange(cluster, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")).startswith(b"HTTP/1.1 200")
