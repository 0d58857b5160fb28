"""One request to a generating endpoint and its response, below ASGI: what an answer costs counts there.

Nothing is passed in messages, and who leaves is noticed by the connection's end: no task has to look out for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

from router.http import Headers, HttpError, header, response_head

if TYPE_CHECKING:
    from router.http_protocol import HttpProtocol

MAX_DISCARD_BYTES = 256 << 20  # of a refused body; what is larger is cut off
CHUNKED = (b"transfer-encoding", b"chunked")


class Endpoint(Protocol):
    """Serves POST requests of one path.

    Attributes:
        max_body_bytes: of a request.
    """

    max_body_bytes: int

    def __call__(self, exchange: HttpExchange) -> Coroutine[Any, Any, None]:
        """Complete the response."""
        ...


class HttpExchange:
    """See the module. What its connection calls comes first.

    Attributes:
        headers: of the request, names in lower case.
        keep_alive: whether the connection may take another request.
        response_complete: all of it has been written.
        is_lost: the client has left before that; whoever serves it was cancelled.
    """

    __slots__ = (
        "_endpoint",
        "_expects_continue",
        "_head",
        "_num_bytes",
        "_pieces",
        "_protocol",
        "_reader",
        "_task",
        "_transport",
        "_whole",
        "headers",
        "is_lost",
        "keep_alive",
        "response_complete",
    )

    def __init__(self, protocol: HttpProtocol, endpoint: Endpoint, keep_alive: bool) -> None:
        self.headers = protocol.headers
        self.keep_alive = keep_alive
        self.response_complete = False
        self.is_lost = False
        self._protocol = protocol
        self._transport = protocol.transport
        self._endpoint = endpoint
        self._expects_continue = protocol.expect_100_continue
        self._pieces: list[bytes] = []  # of the body, as long as it is not too large
        self._num_bytes = 0
        self._whole = False  # the body is
        self._reader: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._head = b""  # of the response, until its first bytes come

    def start(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task[None]:
        """Serve it."""
        self._task = task = loop.create_task(self._endpoint(self))
        return task

    def feed(self, piece: bytes) -> None:
        """Part of the body."""
        self._num_bytes += len(piece)
        if self._num_bytes <= self._endpoint.max_body_bytes:
            self._pieces.append(piece)
        else:
            self._pieces.clear()
            if self._num_bytes > MAX_DISCARD_BYTES:
                self._wake()

    def feed_end(self) -> None:
        """The body is whole."""
        self._whole = True
        self._wake()

    def lose(self) -> None:
        """The client is gone: nobody reads the answer."""
        if not self.response_complete:
            self.is_lost = True
            if self._task is not None:
                self._task.cancel()

    async def read(self) -> bytes:
        """The body.

        Raises:
            HttpError: it is too long; never more of it is kept than is allowed.
        """
        most = self._endpoint.max_body_bytes
        if not self._whole:
            length = int(header(self.headers, b"content-length") or 0)
            if length > most:
                raise _too_large(most, length)
            if self._expects_continue:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            while not self._whole and self._num_bytes <= MAX_DISCARD_BYTES:
                self._reader = asyncio.get_running_loop().create_future()
                await self._reader
        if self._num_bytes > most:
            raise _too_large(most, self._num_bytes)
        pieces = self._pieces
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def answer(self, status: int, headers: Headers, body: bytes, *, close: bool = False) -> None:
        """The whole response. `close`: the connection takes no other request."""
        self.keep_alive = self.keep_alive and not close
        head = self._head_of(status, [*headers, (b"content-length", b"%d" % len(body))])
        self._complete(head + body)

    def begin(self, status: int, headers: Headers) -> None:
        """A response that comes in parts: its head leaves with the first of them."""
        self._head = self._head_of(status, [*headers, CHUNKED])

    async def write(self, part: bytes) -> None:
        """A part that is not empty, once the client keeps up."""
        flow = self._protocol.flow
        if flow.write_paused:
            await flow.drain()
        head, self._head = self._head, b""
        self._transport.write(b"%s%x\r\n%s\r\n" % (head, len(part), part))

    def end(self, part: bytes) -> None:
        """The last part, not empty either."""
        self._complete(b"%s%x\r\n%s\r\n0\r\n\r\n" % (self._head, len(part), part))

    def give_up(self) -> None:
        """Nothing more will be written: a response that is not complete ends with its connection."""
        if not self.response_complete:
            self._transport.close()

    def _head_of(self, status: int, headers: Headers) -> bytes:
        every = self._protocol.server_state.default_headers
        return response_head(status, [*every, *headers], close=not self.keep_alive)

    def _complete(self, last: bytes) -> None:
        if self.response_complete:
            raise RuntimeError("the response is complete already")
        self.response_complete = True
        self._transport.write(last)
        if not self.keep_alive:
            self._transport.close()
        self._protocol.on_response_complete()

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)


def _too_large(most: int, length: int) -> HttpError:
    """A client that still sends would not read an answer on a connection that is closed: only the largest are."""
    message = f"the request body exceeds {most} bytes"
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    return HttpError(status, message, "request_too_large", close=length > MAX_DISCARD_BYTES)
