"""The official client against the gateway."""

from __future__ import annotations

import asyncio

from tests.fakes import make_tokenizer
from tests.router.conftest import Cluster

HELLO = [{"role": "user", "content": "Hello"}]


def said(answer_ids: list[int], num_tokens: int) -> str:
    return make_tokenizer().decode(answer_ids[:num_tokens])


async def test_chat(cluster: Cluster, answer_ids: list[int]) -> None:
    cluster.prefill[0].num_cached = 3
    reply = await cluster.client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_tokens=9)
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == said(answer_ids, 9)
    assert choice.finish_reason == "length"
    assert reply.usage.completion_tokens == 9
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 9
    assert "fast" in reply.system_fingerprint
    assert [len(worker.received) for worker in cluster.prefill + cluster.decode] == [1, 1]


async def test_chat_stream(cluster: Cluster, answer_ids: list[int]) -> None:
    stream = await cluster.client.chat.completions.create(
        model="demo", messages=HELLO, temperature=0, max_tokens=90, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == said(answer_ids, 90)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 90
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completion_and_stream(cluster: Cluster, answer_ids: list[int]) -> None:
    whole = await cluster.client.completions.create(model="demo", prompt="Once", temperature=0)
    assert whole.usage.completion_tokens == 16
    assert whole.choices[0].text == said(answer_ids, 16)
    stream = await cluster.client.completions.create(model="demo", prompt="Once", temperature=0, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_64_streams_at_once(cluster: Cluster, answer_ids: list[int]) -> None:
    async def one(index: int) -> str:
        stream = await cluster.client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": f"Number {index}"}],
            temperature=0,
            stream=True,
            max_tokens=40 + index,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    texts = await asyncio.gather(*map(one, range(64)))
    assert texts == [said(answer_ids, 40 + index) for index in range(64)]
