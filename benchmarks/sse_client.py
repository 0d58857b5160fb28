"""A streaming completion as a client times it; plain asyncio, so that the client costs little."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

PLACEMENT = b"x-baton-placement: "


@dataclass(slots=True)
class Timeline:
    """When each token of one stream arrived, in seconds of `time.perf_counter`.

    Attributes:
        fetched_tokens: of the prompt, whose KV the prefill worker was to fetch from a donor.
    """

    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    fetched_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """From sending the request to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def itl_s(self) -> list[float]:
        """Between consecutive tokens."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


async def stream_completion(port: int, prompt: list[int], max_tokens: int, **extra: Any) -> Timeline:
    """POST /v1/completions with token ids and note when each event comes.

    Raises:
        RuntimeError: the gateway answered with an error.
    """
    fields = {"model": "bench", "prompt": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0.0}
    body = msgspec.json.encode({**fields, "ignore_eos": True, **extra})
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\nX-Baton-Debug: 1\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    timeline = Timeline()
    timeline.sent = time.perf_counter()
    writer.write(head.encode() + body)
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError((status + await reader.read()).decode(errors="replace"))
        while line := await reader.readline():
            if line.startswith(PLACEMENT):
                timeline.fetched_tokens = int(line.rpartition(b"fetched=")[2])
            if not line.startswith(b"data: "):
                continue
            now = time.perf_counter()
            if line.startswith(b'data: {"error"'):
                raise RuntimeError(line.decode())
            if not line.startswith(b"data: [DONE]") and b'"finish_reason":null' in line:
                timeline.arrivals.append(now)
    finally:
        writer.close()
    return timeline
