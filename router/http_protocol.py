"""uvicorn's HTTP protocol, except that a response's head leaves with its first bytes, and request heads are bounded."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from router.http import HttpError, error_json

MAX_HEAD_BYTES = 64 << 10  # of a request: its target and headers


class HttpProtocol(HttpToolsProtocol):
    """One HTTP connection."""

    _in_head = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        super().connection_made(cast(asyncio.Transport, HeadHolder(cast(asyncio.Transport, transport))))

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
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
        """See httptools."""
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed as HTTP."""
        self._refuse(400, msg, "invalid_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        body = error_json(HttpError(status, message, code))
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


class HeadHolder:
    """A transport that keeps the head of a response until its first bytes follow, so that both are one segment.

    uvicorn writes them separately, and uvloop sends what it gets at once.
    """

    __slots__ = ("_head", "_loop", "_transport", "_write", "is_closing", "pause_reading", "resume_reading")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._write = transport.write
        self._head = b""
        self._loop = asyncio.get_running_loop()
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def write(self, data: bytes) -> None:
        """Send, or keep for a moment."""
        if self._head:
            self._write(self._head + data)
            self._head = b""
        elif data.startswith(b"HTTP/1.1 ") and data.endswith(b"\r\n\r\n") and not data.startswith(b"HTTP/1.1 1"):
            self._head = data
            self._loop.call_soon(self._flush)  # if nothing follows, as after HEAD
        else:
            self._write(data)

    def close(self) -> None:
        """Send what is kept, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            self._write(self._head)
            self._head = b""

    def __getattr__(self, name: str) -> Any:
        """The rest of a transport."""
        return getattr(self._transport, name)
