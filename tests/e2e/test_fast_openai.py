"""The official OpenAI client against `baton serve` with a real model: what people do with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.e2e.clusters import Cluster
from tests.e2e.conftest import NUM_PAGES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Jump over the lazy dog!"}]
CONCURRENT = 64


@pytest.fixture
def client(fast: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fast.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_the_model_is_listed(fast: Cluster, client: openai.OpenAI) -> None:
    assert [(model.id, model.max_model_len) for model in client.models.list()] == [(fast.model, 1024)]


def test_chat_streamed_and_not(fast: Cluster, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": fast.model, "messages": HELLO, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content and whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage is not None and 0 < whole.usage.completion_tokens <= 40
    assert whole.system_fingerprint is not None and whole.system_fingerprint.startswith("baton-fast-")
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the second time the prefill worker knew it


def test_echo_and_n(fast: Cluster, client: openai.OpenAI) -> None:
    prompt = "The quick brown"
    asked: dict[str, Any] = {"model": fast.model, "prompt": prompt, "max_tokens": 12, "n": 3, "echo": True}
    greedy = client.completions.create(**asked, temperature=0)
    assert len({choice.text for choice in greedy.choices}) == 1
    assert greedy.choices[0].text.startswith(prompt)
    sampled = client.completions.create(**asked, temperature=1.5, seed=3)
    assert [choice.index for choice in sampled.choices] == [0, 1, 2]
    assert len({choice.text for choice in sampled.choices}) == 3
    assert sampled.usage is not None
    assert sampled.usage.total_tokens == sampled.usage.prompt_tokens + sampled.usage.completion_tokens


def test_seeds_reproduce(fast: Cluster, client: openai.OpenAI) -> None:
    def text(seed: int, top_p: float) -> str:
        reply = client.completions.create(
            model=fast.model, prompt="Zwölf Box", max_tokens=32, temperature=1.0, top_p=top_p, seed=seed
        )
        return reply.choices[0].text

    for top_p in (1.0, 0.9):
        assert text(7, top_p) == text(7, top_p)
        assert text(7, top_p) != text(8, top_p)


def test_logprobs(fast: Cluster, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": fast.model, "temperature": 0, "max_tokens": 10, "logprobs": True}
    reply = client.chat.completions.create(**asked, messages=HELLO, top_logprobs=4)
    assert reply.choices[0].logprobs is not None and reply.usage is not None
    entries = reply.choices[0].logprobs.content or []
    assert len(entries) == reply.usage.completion_tokens
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 4 and values == sorted(values, reverse=True) and values[0] < 0
        assert entry.logprob == values[0] and entry.token == entry.top_logprobs[0].token
    text = b"".join(bytes(entry.bytes or []) for entry in entries).decode(errors="replace")
    assert text == reply.choices[0].message.content


def test_echo_with_logprobs_scores_the_prompt_and_changes_nothing_behind_it(
    fast: Cluster, client: openai.OpenAI
) -> None:
    """Its blocks are cached by then; they are computed all the same."""
    prompt = list(range(5, 60))
    body = {"ignore_eos": True}
    asked: dict[str, Any] = {"model": fast.model, "prompt": prompt, "temperature": 0, "logprobs": 3, "max_tokens": 41}
    plain = client.completions.create(**asked, extra_body=body).choices[0]
    echoed = [client.completions.create(**asked, echo=True, extra_body=body).choices[0] for _ in range(2)]
    assert plain.logprobs is not None and plain.logprobs.token_logprobs is not None
    for choice in echoed:
        assert choice.text.endswith(plain.text) and choice.logprobs is not None
        values, tops = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert values is not None and tops is not None and choice.logprobs.text_offset is not None
        assert len(values) == len(tops) == len(choice.logprobs.text_offset) == len(prompt) + 41
        assert values[0] is None and tops[0] is None and all(tops[1:])
        assert all(value < 0 for value in values[1:])
        np.testing.assert_allclose(values[len(prompt) :], plain.logprobs.token_logprobs, atol=1e-4)
        assert echoed[0].logprobs is not None and echoed[0].logprobs.token_logprobs is not None
        np.testing.assert_allclose(values[1:], echoed[0].logprobs.token_logprobs[1:], atol=1e-4)
    fast.until_at_rest(NUM_PAGES)


def test_stop_string_ends_the_answer_on_the_workers_too(fast: Cluster, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": fast.model, "prompt": "Viktor", "temperature": 0}
    text = client.completions.create(**asked, max_tokens=40).choices[0].text
    stop = text[20:23]
    reply = client.completions.create(**asked, max_tokens=900, stop=[stop])
    assert reply.choices[0].text == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    fast.until_at_rest(NUM_PAGES)


def test_errors_are_the_clients_exceptions(fast: Cluster, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=fast.model, messages=HELLO, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=fast.model, prompt=[5] * 1024)
    assert "1024" in str(long.value)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=HELLO)


async def test_64_streams_at_once_say_what_each_says_alone(fast: Cluster) -> None:
    def asked(index: int) -> dict[str, Any]:
        prompt = [10 + (index * 7 + place * (1 + index % 5)) % 300 for place in range(1 + 9 * index % 200)]
        return {"model": fast.model, "prompt": prompt, "temperature": 0, "max_tokens": 10 + index % 23}

    async with openai.AsyncOpenAI(base_url=f"{fast.url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def streamed(index: int) -> str:
            chunks = await client.completions.create(**asked(index), stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        together = await asyncio.gather(*(streamed(index) for index in range(CONCURRENT)))
        alone = [(await client.completions.create(**asked(index))).choices[0].text for index in range(CONCURRENT)]
    assert together == alone
    assert len(set(alone)) > CONCURRENT // 2
    fast.until_at_rest(NUM_PAGES)
