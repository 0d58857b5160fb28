"""A cheap HTTP/1.1 load generator: one process, no parsing beyond what must be counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

LAST_CHUNK = b"0\r\n\r\n"


@dataclass
class LoadResult:
    """What one run saw.

    Attributes:
        events: server-sent events of complete responses.
        ttft_s: from sending a request to the first bytes of its response, in order of arrival.
    """

    requests: int = 0
    events: int = 0
    wall_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)


def post(path: str, body: bytes) -> bytes:
    """An HTTP request as bytes."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def run_load(port: int, next_request: Callable[[], bytes], connections: int, seconds: float) -> LoadResult:
    """Keep `connections` requests in flight for `seconds`, then let them finish."""
    result = LoadResult()
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(lambda: _Client(next_request, result), "127.0.0.1", port)
        clients.append(client)
    started = time.perf_counter()
    stop_at = started + seconds
    for client in clients:
        client.begin(stop_at)
    await asyncio.gather(*(client.finished for client in clients))
    result.wall_s = time.perf_counter() - started
    for client in clients:
        client.transport.close()
    await asyncio.sleep(0)
    return result


class _Client(asyncio.Protocol):
    """One connection: the next request when the last response is complete."""

    def __init__(self, next_request: Callable[[], bytes], result: LoadResult) -> None:
        self._next_request = next_request
        self._result = result
        self._tail = b""
        self._remaining = -1  # body bytes to come; -1: the headers are not complete, -2: chunked
        self._sent_at = 0.0
        self._stop_at = 0.0
        self.finished = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def begin(self, stop_at: float) -> None:
        """Send the first request."""
        self._stop_at = stop_at
        self._send()

    def _send(self) -> None:
        self._remaining = -1
        self._tail = b""
        request = self._next_request()
        self._sent_at = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._remaining == -1:
            data = self._read_head(data)
        if self._remaining == -2:
            self._result.events += data.count(b"\n\n")
            self._tail = (self._tail + data[-5:])[-5:]
            if self._tail == LAST_CHUNK:
                self._complete()
        elif self._remaining >= 0:
            self._remaining -= len(data)
            if self._remaining == 0:
                self._complete()

    def _read_head(self, data: bytes) -> bytes:
        head, found, rest = data.partition(b"\r\n\r\n")
        if not found or not head.startswith(b"HTTP/1.1 200"):
            self.finished.set_exception(RuntimeError(f"unexpected response: {data[:300]!r}"))
            self.transport.abort()
            return b""
        self._result.ttft_s.append(time.perf_counter() - self._sent_at)
        lowered = head.lower()
        at = lowered.find(b"content-length: ")
        self._remaining = int(lowered[at + 16 :].split(b"\r\n", 1)[0]) if at >= 0 else -2
        return rest

    def _complete(self) -> None:
        self._result.requests += 1
        if time.perf_counter() < self._stop_at:
            self._send()
        else:
            self.finished.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.finished.done():
            self.finished.set_exception(exc or ConnectionError("the server hung up"))
