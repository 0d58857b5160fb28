"""The official client against the gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from tests.fakes import make_tokenizer
from tests.router.conftest import Cluster, run_cluster

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


async def test_n_choices_have_their_own_requests_and_seeds(cluster: Cluster) -> None:
    reply = await cluster.client.chat.completions.create(model="demo", messages=HELLO, n=4, seed=7, max_tokens=20)
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert reply.usage.completion_tokens == 80
    requests = cluster.decode[0].requests()
    assert len({request.request_id for request in requests}) == 4
    assert requests[0].sampling.seed == 7
    assert reply.usage.prompt_tokens == len(requests[0].token_ids)
    again = await cluster.client.chat.completions.create(
        model="demo", messages=HELLO, n=4, seed=7, max_tokens=20, stream=True
    )
    streamed = [""] * 4
    async for chunk in again:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


async def test_chat_logprobs(cluster: Cluster, answer_ids: list[int]) -> None:
    asked = {"model": "demo", "messages": HELLO, "temperature": 0, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    reply = await cluster.client.chat.completions.create(**asked)
    entries = reply.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == reply.choices[0].message.content
    assert bytes(entries[0].bytes).decode() == entries[0].token
    assert [top.logprob for top in entries[0].top_logprobs] == [-0.5, -1.5]
    assert entries[0].top_logprobs[0].token == entries[0].token
    chunks = [chunk async for chunk in await cluster.client.chat.completions.create(**asked, stream=True)]
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == entries
    plain = await cluster.client.chat.completions.create(**{**asked, "top_logprobs": None})
    assert plain.choices[0].logprobs.content[0].top_logprobs == []


async def test_completion_logprobs(cluster: Cluster) -> None:
    asked = {"model": "demo", "prompt": "Once", "temperature": 0, "max_tokens": 5, "logprobs": 2}
    reply = await cluster.client.completions.create(**asked)
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == reply.choices[0].text
    assert logprobs.token_logprobs == [-0.5] * 5
    assert logprobs.text_offset[2] == len("".join(logprobs.tokens[:2]))
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    chunks = [chunk async for chunk in await cluster.client.completions.create(**asked, stream=True)]
    offsets = [
        offset for chunk in chunks if chunk.choices[0].logprobs for offset in chunk.choices[0].logprobs.text_offset
    ]
    assert offsets == logprobs.text_offset


async def test_echo_with_logprobs_scores_the_prompt_where_decode_reads_it(cluster: Cluster) -> None:
    prompt = [65, 66, 67]
    asked = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 2, "logprobs": 0, "echo": True, "n": 2}
    reply = await cluster.client.completions.create(**asked)
    assert [request.sampling.prompt_logprobs for request in cluster.decode[0].requests()] == [True, True]
    assert not cluster.prefill[0].requests()
    for choice in reply.choices:
        logprobs = choice.logprobs
        assert logprobs.token_logprobs == [None, -66.0, -67.0, -0.5, -0.5]
        assert logprobs.top_logprobs == [None] * 5
        assert "".join(logprobs.tokens) == choice.text
        assert logprobs.text_offset[3] == len("".join(logprobs.tokens[:3]))
    streamed: list[float | None] = []
    async for chunk in await cluster.client.completions.create(**{**asked, "n": 1}, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.token_logprobs
    assert streamed == reply.choices[0].logprobs.token_logprobs
    await cluster.client.completions.create(**{**asked, "echo": False, "n": 1})
    assert not cluster.decode[0].requests()[-1].sampling.prompt_logprobs


@pytest.mark.parametrize("stream", [True, False])
async def test_stop_string_ends_the_work(cluster: Cluster, stream: bool) -> None:
    cluster.decode[0].step_s = 0.005
    asked = {"model": "demo", "messages": HELLO, "temperature": 0, "max_tokens": 300, "stop": ["nope", "over the"]}
    reply = await cluster.client.chat.completions.create(**asked, stream=stream)
    if stream:
        chunks = [chunk async for chunk in reply]
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, reason) == ("The quick brown fox jumps ", "stop")
    await cluster.until(lambda: not cluster.decode[0].active)
    assert len(cluster.decode[0].cancelled) == 1


async def test_stop_token(cluster: Cluster, answer_ids: list[int]) -> None:
    asked = {"model": "demo", "prompt": "x", "temperature": 0, "extra_body": {"stop_token_ids": [answer_ids[5]]}}
    reply = await cluster.client.completions.create(**asked)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].text == said(answer_ids, 5)
    asked["extra_body"]["ignore_eos"] = True
    assert (await cluster.client.completions.create(**asked)).choices[0].finish_reason == "length"


async def test_one_token_and_stop_as_the_first(cluster: Cluster, answer_ids: list[int]) -> None:
    reply = await cluster.client.completions.create(model="demo", prompt="x", temperature=0, max_tokens=1)
    assert (reply.choices[0].text, reply.usage.completion_tokens) == (said(answer_ids, 1), 1)
    first = {"stop_token_ids": [answer_ids[0]]}
    reply = await cluster.client.completions.create(model="demo", prompt="x", temperature=0, extra_body=first)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("", "stop")
    chunks = await cluster.client.chat.completions.create(
        model="demo", messages=HELLO, temperature=0, extra_body=first, stream=True
    )
    assert [chunk.choices[0].finish_reason async for chunk in chunks][-1] == "stop"


@pytest.mark.parametrize(
    ("prompt", "choices"), [("Once", 1), (["Once", "Twice"], 2), ([65, 66, 67], 1), ([[65], [66, 67], [68]], 3)]
)
@pytest.mark.parametrize("echo", [True, False])
async def test_every_form_of_prompt(cluster: Cluster, answer_ids: list[int], prompt, choices: int, echo: bool) -> None:
    asked = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 3, "n": 2, "echo": echo}
    reply = await cluster.client.completions.create(**asked)
    prompts = [request.token_ids for request in cluster.decode[0].requests()]
    assert [choice.index for choice in reply.choices] == list(range(2 * choices))
    assert prompts[::2] == prompts[1::2]
    assert reply.usage.prompt_tokens == sum(map(len, prompts[::2]))
    spoken = [make_tokenizer().decode(ids) if echo else "" for ids in prompts]
    assert [choice.text for choice in reply.choices] == [text + said(answer_ids, 3) for text in spoken]
    streamed = [""] * len(reply.choices)
    async for chunk in await cluster.client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in reply.choices]


async def test_sampling_reaches_the_workers(cluster: Cluster) -> None:
    await cluster.client.completions.create(
        model="demo", prompt="x", temperature=0.5, top_p=0.9, seed=-1, presence_penalty=1, frequency_penalty=-1,
        logit_bias={"5": 3}, max_tokens=2,
        extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "ignore_eos": True},
    )  # fmt: skip
    sampling = cluster.decode[0].requests()[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.logit_bias, sampling.seed, sampling.ignore_eos) == (((5, 3.0),), 2**64 - 1, True)
    assert cluster.prefill[0].requests()[0] == cluster.decode[0].requests()[0]


async def test_chat_may_use_the_rest_of_the_context(cluster: Cluster) -> None:
    reply = await cluster.client.chat.completions.create(model="demo", messages=HELLO, temperature=0)
    assert reply.usage.total_tokens == 512
    assert reply.choices[0].finish_reason == "length"


async def test_long_prompts_are_tokenized_off_the_loop(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, inline_tokenize_chars=10) as cluster:
        text = "The quick brown fox jumps over the lazy dog. <|im_end|> "
        reply = await cluster.client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": text}], temperature=0, max_tokens=3
        )
        assert reply.choices[0].message.content == said(answer_ids, 3)


async def test_models_and_operators_routes(cluster: Cluster) -> None:
    models = await cluster.client.models.list()
    assert [model.id for model in models.data] == ["demo"]
    assert (await cluster.client.models.retrieve("demo")).max_model_len == 512
    with pytest.raises(openai.NotFoundError) as caught:
        await cluster.client.models.retrieve("a/b")
    assert caught.value.code == "model_not_found"
    assert (await cluster.http.get("/health")).status_code == 200
    ready = await cluster.http.get("/readiness")
    assert ready.json() == {"status": "ready", "prefill": 1, "decode": 1}
    kuberay = await cluster.http.get("/-/healthz")  # where KubeRay asks
    assert (kuberay.status_code, kuberay.text) == (200, "success")
    assert (await cluster.http.get("/version")).json()["system_fingerprint"] == "baton-fast-fp"
    assert (await cluster.http.get("/config")).json()["model_name"] == "demo"
    assert (await cluster.http.get("/docs")).status_code == 200
    schema = (await cluster.http.get("/openapi.json")).json()
    assert "/v1/chat/completions" in schema["paths"]
    assert "temperature" in schema["components"]["schemas"]["ChatBody"]["properties"]


async def test_metrics(cluster: Cluster) -> None:
    await cluster.client.completions.create(model="demo", prompt="Once", temperature=0)
    await cluster.http.post("/v1/completions", json={})
    lines = (await cluster.http.get("/metrics")).text.splitlines()
    for line in (
        'baton_requests_total{endpoint="completions",status="200"} 1.0',
        'baton_requests_total{endpoint="completions",status="400"} 1.0',
        "baton_time_to_first_token_seconds_count 1.0",
        "baton_inter_token_latency_seconds_count 15.0",
        "baton_e2e_request_latency_seconds_count 1.0",
        "baton_generation_tokens_total 16.0",
        "baton_streams_running 0.0",
        'baton_num_requests_running{role="decode",worker="decode-0"} 0.0',
        'baton_num_requests_waiting{role="prefill",worker="prefill-0"} 0.0',
        'baton_compiles_after_warmup{role="decode",worker="decode-0"} 0.0',
        'baton_preemptions_total{role="decode",worker="decode-0"} 0.0',
        'baton_worker_connected{role="prefill",worker="prefill-0"} 1.0',
    ):
        assert line in lines, "\n".join(lines)


async def test_api_keys(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, api_keys=("sk-one", "sk-two")) as cluster:
        assert (await cluster.client.chat.completions.create(model="demo", messages=HELLO, max_tokens=1)).choices
        for path in ("/v1/completions", "/v1/models", "/config"):
            method = "POST" if path.endswith("completions") else "GET"
            for key in ("", "Bearer sk-three", "Basic sk-one", "Bearer sk-one2", "Bearer"):
                reply = await cluster.http.request(method, path, headers={"authorization": key} if key else {})
                assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        wrong = cluster.client.with_options(api_key="sk-no")
        with pytest.raises(openai.AuthenticationError):
            await wrong.models.list()
        assert (await cluster.http.get("/health")).status_code == 200
        headers = {"authorization": "Bearer sk-two"}
        assert (await cluster.http.get("/config", headers=headers)).json()["api_keys"] == 2


async def test_errors_reach_the_client_as_its_exceptions(cluster: Cluster) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await cluster.client.chat.completions.create(model="demo", messages=HELLO, temperature=9)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        await cluster.client.chat.completions.create(model="gpt-4", messages=HELLO)


async def test_colocated_fleet(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, prefill=0, decode=1, colocated=True) as cluster:
        assert (await cluster.http.get("/readiness")).status_code == 200
        reply = await cluster.client.completions.create(model="demo", prompt="Once", temperature=0)
        assert reply.choices[0].text == said(answer_ids, 16)
        assert cluster.decode[0].received[0].prefill is None


async def test_headers_leave_with_the_first_chunk(cluster: Cluster) -> None:
    """An error before the first token has its own status; TTFT is one write."""
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.gateway.port)
    body = b'{"model": "demo", "prompt": "x", "stream": true, "max_tokens": 1}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    first = await reader.read(65536)
    assert first.startswith(b"HTTP/1.1 200")
    assert b"data: {" in first
    writer.close()
    await writer.wait_closed()
