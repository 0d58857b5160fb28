"""Requests of every kind, the same ones each time, and what a gateway answers to them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import httpx

FIRST_ID = 3  # below it tokenizers keep special tokens
TIMEOUT_S = 300.0

Answer = tuple[Any, ...]
"""Text, finish reason and, where asked for, every token with its log probability: equal means the same token ids."""


def mixed_requests(count: int, vocab: int, *, max_prompt: int, max_tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Bodies of /v1/completions: greedy and seeded, short and long, some with prefixes in common."""
    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randrange(FIRST_ID, vocab) for _ in range(length)]

    prefixes = [ids(rng.randrange(max_prompt // 4, max_prompt // 2)) for _ in range(4)]
    bodies = []
    for index in range(count):
        length = max(1, int(max_prompt ** rng.random()))
        prompt = ids(length)
        if rng.random() < 0.4:
            prefix = rng.choice(prefixes)
            prompt = (prefix[: rng.randrange(1, len(prefix))] + prompt)[:max_prompt]
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.randint(1, max_tokens), "temperature": 0}
        if index % 5 > 1:
            body |= {"temperature": rng.uniform(0.3, 1.5), "seed": rng.randrange(2**31)}
            body |= rng.choice(_FILTERS)
        if rng.random() < 0.2:
            body |= {"presence_penalty": 0.8, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
        if rng.random() < 0.15:
            body["logit_bias"] = {str(rng.randrange(FIRST_ID, vocab)): rng.uniform(-5, 5) for _ in range(5)}
        if rng.random() < 0.5:
            body["logprobs"] = rng.choice([0, 1, 5])
        bodies.append(body)
    return bodies


_FILTERS: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.8, "top_k": 50}]


async def answers(
    port: int,
    model: str,
    bodies: Sequence[dict[str, Any]],
    concurrency: int,
    *,
    seed: int = 0,
    patience_s: Sequence[float | None] | None = None,
) -> list[Answer | None]:
    """Send all bodies, in an order of their own for each seed, at most `concurrency` at a time.

    Args:
        patience_s: for each body after how long its client leaves, None: never.

    Returns:
        The answer to each body; None where the client left before it was complete.

    Raises:
        RuntimeError: one was answered with an error.
    """
    order = list(range(len(bodies)))
    random.Random(seed).shuffle(order)
    found: dict[int, Answer | None] = {}
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=concurrency)) as client:

        async def work() -> None:
            while order:
                index = order.pop()
                asked = client.post(f"http://127.0.0.1:{port}/v1/completions", json={"model": model, **bodies[index]})
                try:
                    reply = await asyncio.wait_for(asked, patience_s[index] if patience_s else None)
                except TimeoutError:
                    found[index] = None
                    continue
                if reply.status_code != 200:
                    raise RuntimeError(reply.text)
                found[index] = _answer(reply.json()["choices"][0])

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return [found[index] for index in range(len(bodies))]


def _answer(choice: dict[str, Any]) -> Answer:
    logprobs = choice["logprobs"]
    tokens = () if logprobs is None else tuple(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))
    return choice["text"], choice["finish_reason"], tokens
