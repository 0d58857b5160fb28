"""uvicorn's HTTP protocol, except for five things.

Requests to the generating endpoints are served below ASGI (`http_exchange`). A response's head leaves with its first
bytes, as one segment; what all connections write in one round of the loop leaves together (`outbox`). Request heads are
bounded. Idle connections are found by a look at all of them now and then: a timer for every response costs more.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import httptools
from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from router.http import JSON_TYPE, Headers, HttpError, error_json, response_head
from router.http_exchange import CHUNKED, Endpoint, HttpExchange
from router.outbox import LateTransport, Outbox

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10  # of a request: its target and headers
MAX_EARLY = 4  # requests of a connection that may wait for the answer to an earlier one
BODILESS = frozenset({204, 304})  # statuses


class HttpProtocol(HttpToolsProtocol):
    """One HTTP connection.

    Args:
        endpoints: those that are served below ASGI, by path.
        outbox: of the loop.
        others: see uvicorn.

    Attributes:
        idle_since: when its last response ended, on the loop's clock; infinite while it is in use.
    """

    idle_since = math.inf
    _in_head = False
    _head_bytes = 0

    def __init__(self, endpoints: Mapping[str, Endpoint], outbox: Outbox, **others: Any) -> None:
        super().__init__(**others)
        self._endpoints = endpoints
        self._outbox = outbox
        self._serving: HttpExchange | None = None  # the latest, if its request was served below ASGI

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(LateTransport(transport, self._outbox))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if self._serving is not None:
            self._serving.lose()
        if isinstance(self.cycle, HttpExchange):
            self.cycle = None  # type: ignore[assignment]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self.idle_since = math.inf
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(431, f"the request's headers exceed {MAX_HEAD_BYTES} bytes", "headers_too_large")

    def on_message_begin(self) -> None:
        """See httptools."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """See httptools. The application begins before the body is there."""
        self._in_head = False
        parser, scope = self.parser, self.scope
        version = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = version
        scope["path"], scope["raw_path"], scope["query_string"] = _parts_of(self.url)
        keep_alive = version != "1.0" and parser.should_keep_alive()
        endpoint = self._endpoints.get(scope["path"]) if scope["method"] == "POST" else None
        cycle = Cycle(self, keep_alive) if endpoint is None else HttpExchange(self, endpoint, keep_alive)
        earlier, self.cycle = self.cycle, cycle  # type: ignore[assignment]  # either will do
        if earlier is None or earlier.response_complete:
            self._begin(cycle)
        else:  # the client has not waited for its answer
            self.pipeline.appendleft((cycle, self.app))  # type: ignore[arg-type]
            if len(self.pipeline) >= MAX_EARLY:  # while nothing is read, nobody sees that the client has left
                self.flow.pause_reading()

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        if not isinstance(self.cycle, HttpExchange):
            super().on_body(body)
        elif not self.cycle.response_complete:
            self.cycle.feed(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        if isinstance(self.cycle, HttpExchange):
            self.cycle.feed_end()
        else:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request is over: the next one, if it is here."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._begin(self.pipeline.pop()[0])  # type: ignore[arg-type]
        else:
            self.idle_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed as HTTP."""
        self._refuse(400, msg, "invalid_http")

    def _begin(self, cycle: Cycle | HttpExchange) -> None:
        if isinstance(cycle, HttpExchange):
            self._serving = cycle
            task = cycle.start(self.loop)
        else:
            self._serving = None
            task = self.loop.create_task(cycle.run_asgi(self.app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _refuse(self, status: int, message: str, code: str) -> None:
        body = error_json(HttpError(status, message, code))
        head = response_head(status, [JSON_TYPE, (b"content-length", b"%d" % len(body))], close=True)
        self.transport.write(head + body)
        self.transport.close()


@lru_cache(maxsize=256)
def _parts_of(target: bytes) -> tuple[str, bytes, bytes]:
    """Path, the same as it was sent, and query string of a request's target."""
    url = httptools.parse_url(target)
    path = url.path.decode("ascii")
    return unquote(path) if "%" in path else path, url.path, url.query or b""


class Cycle(RequestResponseCycle):
    """One request to the ASGI application, and its response.

    Args:
        keep_alive: whether the connection may take another request.
    """

    def __init__(self, protocol: HttpProtocol, keep_alive: bool) -> None:
        super().__init__(
            protocol.scope,
            protocol.transport,
            protocol.flow,
            logger,
            logger,
            False,
            protocol.server_state.default_headers,
            asyncio.Event(),
            protocol.expect_100_continue,
            keep_alive,
            protocol.on_response_complete,
        )
        self._head = b""  # of the response, until its first bytes come

    async def send(self, message: Message) -> None:  # type: ignore[override]  # uvicorn has a type for each kind
        """See ASGI."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if kind == "http.response.start" and not self.response_started:
            self._head = self._head_of(message["status"], [*self.default_headers, *message.get("headers", ())])
            self.response_started = True
            self.waiting_for_100_continue = False
        elif kind == "http.response.body" and self.response_started and not self.response_complete:
            self._write(message.get("body", b""), bool(message.get("more_body")))
        else:
            raise RuntimeError(f"the application may not send {kind} now")

    def _head_of(self, status: int, headers: Headers) -> bytes:
        """Status line and headers; sets how the body is framed."""
        self.chunked_encoding = self.scope["method"] != "HEAD" and status not in BODILESS
        says_close = False
        for name, value in headers:
            if name == b"content-length":
                self.chunked_encoding = False
                self.expected_content_length = int(value)
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive, says_close = False, True
        framing = [CHUNKED] if self.chunked_encoding else []
        return response_head(status, [*headers, *framing], close=not self.keep_alive and not says_close)

    def _write(self, body: bytes, more_body: bool) -> None:
        """Part of the body, behind the head if that is still here."""
        head, self._head = self._head, b""
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
            body = b""
        elif self.chunked_encoding:
            chunk = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
            body = chunk if more_body else chunk + b"0\r\n\r\n"
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0 or (self.expected_content_length and not more_body):
                raise RuntimeError("the response's body is not as long as its headers say")
        self.transport.write(head + body)
        if not more_body:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()


def close_idle(connections: Iterable[object], since: float) -> None:
    """Close those that have not been used since then."""
    for connection in list(connections):
        if isinstance(connection, HttpProtocol) and connection.idle_since < since:
            connection.transport.close()
