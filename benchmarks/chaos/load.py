"""Streams of every kind over and over, each compared with what it said undisturbed."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.chaos.fate import Fate
from benchmarks.mixed_load import mixed_requests

TIMEOUT_S = 180.0
EACH_ITS_OWN = httpx.Limits(max_keepalive_connections=0)  # connections, so that every gateway gets its share
AGAIN_S = 0.05  # until a client whose gateway died asks again
BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError)  # the connection, not the answer

Said = tuple[Any, ...]
"""Per choice text, finish reason, tokens and log probabilities; and the usage: equal means the same stream."""


def chaos_requests(count: int, vocab: int, max_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Greedy and seeded, penalties, log probabilities; some with n and stop strings, most of them long."""
    rng = random.Random(seed)
    bodies = mixed_requests(count, vocab, max_prompt=120, max_tokens=max_tokens, seed=seed)
    for index, body in enumerate(bodies):
        body["max_tokens"] = rng.randint(max_tokens // 2, max_tokens)
        body["ignore_eos"] = True
        if index % 6 == 3:
            body["n"] = 2
            body |= {"temperature": 0.8, "seed": rng.randrange(2**31)}
        if index % 5 == 2:
            body["stop"] = [rng.choice(["e", "a", "qu", "th", " s"])]
    return bodies


@dataclass(slots=True)
class Score:
    """What became of the streams.

    Attributes:
        retried: asked again, as the gateway that served them was killed.
        errors: of those that were lost, some.
        gaps_s: the longest between two events of a stream, by the fault that had begun last when it ended.
        longest_gap_s: of these all, but for those while a gateway stood still.
    """

    streams: int = 0
    retried: int = 0
    mismatched: int = 0
    lost: int = 0
    longest_gap_s: float = 0.0
    gaps_s: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


class Load:
    """Clients that ask again, as OpenAI's do, where the connection breaks; here only where a gateway was killed.

    Args:
        url: of the OpenAI API.
        bodies: what they ask, in turn.
        fate: of the gateways.
    """

    def __init__(self, url: str, model: str, bodies: Sequence[dict[str, Any]], fate: Fate) -> None:
        self._fate = fate
        self.score = Score()
        self._url = f"{url}/completions"
        options = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        self._bodies = [{**body, **options} for body in bodies]
        self._said: list[Said] = []
        self._next = 0

    async def undisturbed(self, concurrency: int) -> None:
        """Ask everything once; what is said then is the truth. Raises RuntimeError where a stream is lost."""
        found: dict[int, Said] = {}
        todo = list(range(len(self._bodies)))

        async def work(client: httpx.AsyncClient) -> None:
            while todo:
                index = todo.pop()
                found[index] = await self._ask(client, self._bodies[index])

        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=EACH_ITS_OWN) as client:
            await asyncio.gather(*(work(client) for _ in range(concurrency)))
        self._said = [found[index] for index in range(len(self._bodies))]

    async def until(self, over: asyncio.Event, concurrency: int) -> None:
        """Ask again and again until told; streams that run then may end."""
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=EACH_ITS_OWN) as client:
            await asyncio.gather(*(self._work(client, over) for _ in range(concurrency)))

    async def _work(self, client: httpx.AsyncClient, over: asyncio.Event) -> None:
        while not over.is_set():
            index = self._next % len(self._bodies)
            self._next += 1
            self.score.streams += 1
            try:
                said = await self._ask_until_served(client, self._bodies[index])
            except (httpx.HTTPError, RuntimeError) as error:
                self.score.lost += 1
                self.score.errors.append(f"{type(error).__name__}: {error} (after: {self._fate.latest})")
                continue
            if said != self._said[index]:
                self.score.mismatched += 1
                self.score.errors.append(f"request {index}: {said!r:.300} instead of {self._said[index]!r:.300}")

    async def _ask_until_served(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Said:
        while True:
            num_gone = self._fate.num_gone
            try:
                return await self._ask(client, body)
            except BROKEN:
                if not self._fate.excuses(num_gone):
                    raise
            self.score.retried += 1
            await asyncio.sleep(AGAIN_S)

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Said:
        loop = asyncio.get_running_loop()
        stream, heard_at, num_frozen = _Stream(body.get("n", 1)), 0.0, 0
        async with client.stream("POST", self._url, json=body) as reply:
            if reply.status_code != 200:
                raise RuntimeError(f"{reply.status_code}: {(await reply.aread()).decode():.300}")
            async for line in _lines(reply):
                if heard_at:
                    self._note_gap(loop.time() - heard_at, num_frozen)
                heard_at, num_frozen = loop.time(), self._fate.num_frozen - self._fate.is_frozen
                if line.startswith("data: "):
                    stream.take(line.removeprefix("data: "))
        return stream.said()

    def _note_gap(self, seconds: float, num_frozen: int) -> None:
        """`num_frozen`: gateways that had been stopped, and went on, when it began."""
        score, latest = self.score, self._fate.latest
        score.gaps_s[latest] = max(score.gaps_s.get(latest, 0.0), seconds)
        if self._fate.num_frozen == num_frozen:
            score.longest_gap_s = max(score.longest_gap_s, seconds)


async def _lines(reply: httpx.Response) -> AsyncIterator[str]:
    """Of an event stream; httpx would end lines at U+2028 and others within an answer, too."""
    rest = ""
    async for text in reply.aiter_text():
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line


class _Stream:
    """One answer as its events come."""

    def __init__(self, n: int) -> None:
        self._texts = [""] * n
        self._reasons: list[str | None] = [None] * n
        self._tokens: list[list[Any]] = [[] for _ in range(n)]
        self._usage: dict[str, int] = {}
        self._done = False

    def take(self, text: str) -> None:
        """The content of an event. Raises RuntimeError where it is an error."""
        if text == "[DONE]":
            self._done = True
            return
        event = json.loads(text)
        if "error" in event:
            raise RuntimeError(event["error"]["message"])
        self._usage = event.get("usage") or self._usage
        for choice in event["choices"]:
            index = choice["index"]
            self._texts[index] += choice["text"]
            self._reasons[index] = choice["finish_reason"] or self._reasons[index]
            if columns := choice["logprobs"]:
                self._tokens[index] += zip(columns["tokens"], columns["token_logprobs"], strict=True)

    def said(self) -> Said:
        """All of it. Raises RuntimeError where something is missing."""
        if not self._done or not self._usage or None in self._reasons:
            raise RuntimeError("the stream ended early")
        choices = zip(self._texts, self._reasons, map(tuple, self._tokens), strict=True)
        return tuple(choices), self._usage["prompt_tokens"], self._usage["completion_tokens"]
