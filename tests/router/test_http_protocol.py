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
from router.outbox import LateTransport, Outbox
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

    def get_extra_info(self, name: str, default: object = None) -> None:
        return None

    pause_reading = resume_reading = is_closing


def connect(app: ASGIApp) -> tuple[HttpProtocol, Recorder]:
    """A connection to an application."""
    recorder = Recorder()
    config = uvicorn.Config(app, lifespan="off", log_config=None)  # type: ignore[arg-type]
    outbox = Outbox(asyncio.get_running_loop())
    protocol = HttpProtocol({}, outbox, config=config, server_state=ServerState(), app_state={})
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
    reader, writer = await asyncio.open_connection("127.0.0.1", address.gateway.port)
    writer.write(post + b"connection: close\r\nexpect: 100-continue\r\n\r\n")
    async with asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_body_in_pieces(address: Cluster) -> None:
    content = b'{"model":"demo","prompt":"x","max_tokens":1}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", address.gateway.port)
    writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
    for byte in content:
        writer.write(b"1\r\n%c\r\n" % byte)
        await asyncio.sleep(0.001)
    writer.write(b"0\r\n\r\n")
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_the_first_of_two_requests_is_dropped_with_its_client(address: Cluster) -> None:
    """The second one waits for the first: it is the first that runs."""
    address.decode[0].step_s = 0.01
    body = b'{"model":"demo","prompt":"x","max_tokens":400}'
    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    _, writer = await asyncio.open_connection("127.0.0.1", address.gateway.port)
    writer.write(post + post)
    metrics = address.service.metrics
    async with asyncio.timeout(3):  # of a machine that has the time
        await address.until(lambda: bool(address.decode[0].active))
        writer.transport.abort()
        await address.until(lambda: not metrics.running_streams)
    assert metrics.choices["cancelled"] == 1
    assert metrics.requests["completions", 499] == 1


async def test_what_connections_write_leaves_at_the_end_of_the_round() -> None:
    outbox = Outbox(asyncio.get_running_loop())
    recorders = [Recorder() for _ in range(3)]
    first, second, third = (LateTransport(recorder, outbox) for recorder in recorders)  # type: ignore[arg-type]
    for transport in (first, second, first):
        transport.write(b"ab")
    third.write(b"the last word")
    third.close()
    assert [recorder.writes for recorder in recorders] == [[], [], [b"the last word"]]
    assert third.is_closing()
    recorders[1].closed = True  # by the other side
    await asyncio.sleep(0)
    assert [recorder.writes for recorder in recorders] == [[b"abab"], [], [b"the last word"]]


async def test_a_gateway_hangs_up_on_idle_clients(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, keep_alive_s=1) as cluster:
        assert (await exchange(cluster, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")).startswith(b"HTTP/1.1 200")
