"""Every bad input is a 4xx OpenAI error object that names the field, and harms nobody else."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.router.conftest import Cluster, run_cluster

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "demo", "prompt": "Hi"}
USER = {"role": "user", "content": "Hi"}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(model_dir: Path, answer_ids: list[int]) -> AsyncIterator[Cluster]:
    async with run_cluster(model_dir, answer_ids) as running:
        yield running


pytestmark = pytest.mark.asyncio(loop_scope="module")

BOTH = [
    ({"model": "gpt-4"}, 404, "model", "model_not_found"),
    ({"model": 5}, 400, "model", "invalid_type"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": -1}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": "5"}, 400, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, 400, "max_tokens", "invalid_type"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "invalid_type"),
    ({"max_tokens": 10**9}, 400, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": 10**30}, 400, "max_tokens", "invalid_value"),
    ({"temperature": -0.1}, 400, "temperature", "invalid_value"),
    ({"temperature": 2.1}, 400, "temperature", "invalid_value"),
    ({"temperature": "hot"}, 400, "temperature", "invalid_type"),
    ({"top_p": 0}, 400, "top_p", "invalid_value"),
    ({"top_p": 1.01}, 400, "top_p", "invalid_value"),
    ({"top_k": -2}, 400, "top_k", "invalid_value"),
    ({"min_p": 1}, 400, "min_p", "invalid_value"),
    ({"presence_penalty": 3}, 400, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, 400, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "invalid_value"),
    ({"n": 0}, 400, "n", "invalid_value"),
    ({"n": 10**9}, 400, "n", "invalid_value"),
    ({"seed": 2**63}, 400, "seed", "invalid_value"),
    ({"seed": "x"}, 400, "seed", "invalid_type"),
    ({"stop": ["a"] * 5}, 400, "stop", "invalid_value"),
    ({"stop": ""}, 400, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, 400, "stop[1]", "invalid_value"),
    ({"stop": "x" * 10**6}, 400, "stop", "invalid_value"),
    ({"stop": 5}, 400, "stop", "invalid_type"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids[0]", "invalid_value"),
    ({"stop_token_ids": [10**6]}, 400, "stop_token_ids", "invalid_value"),
    ({"stop_token_ids": list(range(200))}, 400, "stop_token_ids", "invalid_value"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_type"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {"-5": 1}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {"100000": 1}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, 400, "logit_bias", "invalid_value"),
    ({"stream": "yes"}, 400, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "unknown_parameter"),
    ({"bogus": 1}, 400, "bogus", "unknown_parameter"),
    ({"kv_transfer_params": {}}, 400, "kv_transfer_params", "unknown_parameter"),
]
CHAT_ONLY = [
    ({"messages": []}, 400, "messages", "empty_prompt"),
    ({"messages": None}, 400, "messages", "invalid_type"),
    ({"messages": "Hi"}, 400, "messages", "invalid_type"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [USER, {"role": "user"}]}, 400, "messages[1].content", "missing_required_parameter"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role", "missing_required_parameter"),
    ({"messages": [USER, {"role": 5, "content": "x"}]}, 400, "messages[1].role", "invalid_type"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "invalid_type"),
    ({"messages": [{**USER, "x": 1}]}, 400, "messages[0].x", "unknown_parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        400,
        "messages[0].content[0]",
        "unsupported_value",
    ),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "x" * 10**7}]}, 400, "messages", "context_length_exceeded"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "invalid_value"),
    ({"max_completion_tokens": 600}, 400, "max_completion_tokens", "context_length_exceeded"),
    ({"max_completion_tokens": 6, "max_tokens": 5}, 400, "max_tokens", "invalid_value"),
    ({"logprobs": 5}, 400, "logprobs", "invalid_type"),
    ({"top_logprobs": 5}, 400, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_value"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_value"),
    ({"n": 129}, 400, "n", "invalid_value"),
    ({"tools": [{"type": "function"}], "tool_choice": "auto"}, 400, "tools", "unsupported_value"),
    ({"tool_choice": "required"}, 400, "tool_choice", "unsupported_value"),
    ({"messages": [{**USER, "tool_calls": [1]}]}, 400, "messages[0].tool_calls", "unsupported_value"),
    ({"messages": [USER] * 600}, 400, "messages", "context_length_exceeded"),
    ({"min_tokens": 5}, 400, "min_tokens", "unsupported_value"),
    ({"chat_template_kwargs": 5}, 400, "chat_template_kwargs", "invalid_type"),
    ({"chat_template_kwargs": {"x": "y" * 20000}}, 400, "chat_template_kwargs", "invalid_value"),
    ({"chat_template_kwargs": {"eos_token": "x"}}, 400, "chat_template_kwargs", "invalid_value"),
    ({"chat_template_kwargs": {"self": "x"}}, 400, "chat_template_kwargs", "invalid_value"),
    ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs", "invalid_value"),
]
TEXT_ONLY = [
    ({"prompt": ""}, 400, "prompt", "empty_prompt"),
    ({"prompt": None}, 400, "prompt", "missing_required_parameter"),
    ({"prompt": []}, 400, "prompt", "invalid_value"),
    ({"prompt": [[]]}, 400, "prompt[0]", "empty_prompt"),
    ({"prompt": ["a", ""]}, 400, "prompt[1]", "empty_prompt"),
    ({"prompt": ["a", 5]}, 400, "prompt[1]", "invalid_type"),
    ({"prompt": [5, "a"]}, 400, "prompt[1]", "invalid_type"),
    ({"prompt": [[5], "a"]}, 400, "prompt[1]", "invalid_type"),
    ({"prompt": [-1]}, 400, "prompt[0]", "invalid_value"),
    ({"prompt": [1, 10**6]}, 400, "prompt[1]", "invalid_value"),
    ({"prompt": [[1], [1, 10**6]]}, 400, "prompt[1][1]", "invalid_value"),
    ({"prompt": 5}, 400, "prompt", "invalid_type"),
    ({"prompt": [1.5]}, 400, "prompt[0]", "invalid_type"),
    ({"prompt": [1] * 512}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": ["a"] * 200}, 400, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 10, "n": 20}, 400, "n", "invalid_value"),
    ({"prompt": "a", "logprobs": 21}, 400, "logprobs", "invalid_value"),
    ({"prompt": "a", "logprobs": -1}, 400, "logprobs", "invalid_value"),
    ({"prompt": "a", "best_of": 2}, 400, "best_of", "unsupported_value"),
    ({"prompt": "a", "suffix": "z"}, 400, "suffix", "unsupported_value"),
    ({"messages": []}, 400, "messages", "unknown_parameter"),
]
CASES = [("/v1/chat/completions", {**CHAT, **extra}, *rest) for extra, *rest in BOTH + CHAT_ONLY]
CASES += [("/v1/completions", {**TEXT, **extra}, *rest) for extra, *rest in BOTH + TEXT_ONLY]


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), CASES)
async def test_bad_field(shared: Cluster, path: str, body: dict, status: int, param: str, code: str) -> None:
    reply = await shared.http.post(path, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


RAW = [
    b"", b"{", b"nonsense", b"[1]", b'{"model": "demo", "prompt": "\xff"}', b'{"model": "demo", "prompt": "\\ud800"}',
    b"\xef\xbb\xbf{}", b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"temperature": 1e400}',
    b'{"model": "demo", "prompt": "a\x00b"}', b'{"metadata":' + b"[" * 10**5 + b"]" * 10**5 + b"}", b"null", b"{}x",
]  # fmt: skip


@pytest.mark.parametrize("body", RAW)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_bad_body(shared: Cluster, path: str, body: bytes) -> None:
    reply = await shared.http.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"]
    assert "Traceback" not in reply.text


async def test_error_says_how_long_the_prompt_was(shared: Cluster) -> None:
    reply = await shared.http.post("/v1/completions", json={**TEXT, "prompt": [1] * 600})
    message = reply.json()["error"]["message"]
    assert "512" in message
    assert "600" in message


async def test_exactly_the_context_fits(shared: Cluster) -> None:
    body = {**TEXT, "prompt": [65] * 500, "max_tokens": 12, "temperature": 0}
    reply = await shared.http.post("/v1/completions", json=body)
    assert reply.json()["usage"]["total_tokens"] == 512
    reply = await shared.http.post("/v1/completions", json={**body, "max_tokens": 13})
    assert reply.json()["error"]["code"] == "context_length_exceeded"


async def test_wrong_url_method_and_type(shared: Cluster) -> None:
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ):
        reply = await shared.http.request(method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    reply = await shared.http.post("/v1/completions", content=b"a=b", headers={"content-type": "text/plain"})
    assert reply.status_code == 415


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_of_100_megabytes(shared: Cluster, chunked: bool) -> None:
    """Refused while others are served, and never held in memory."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 2**20

    def peak_kb() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1])
        raise AssertionError

    before = peak_kb()
    headers = {"content-type": "application/json"} | ({} if chunked else {"content-length": str(100 * 2**20)})
    big = asyncio.create_task(shared.http.post("/v1/completions", content=pieces(), headers=headers))
    small = await shared.http.post("/v1/completions", json={**TEXT, "temperature": 0})
    assert small.status_code == 200
    reply = await big
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    assert peak_kb() - before < 90 * 1024


async def test_tolerated_fields(shared: Cluster) -> None:
    body = {
        **CHAT, "user": "me", "metadata": {"a": "b"}, "store": False, "response_format": {"type": "text"}, "tools": [],
        "tool_choice": "none", "parallel_tool_calls": True, "service_tier": "auto", "modalities": ["text"], "n": None,
        "temperature": None, "stop": None, "logit_bias": {}, "seed": -5, "max_completion_tokens": 3, "top_k": -1,
    }  # fmt: skip
    body["messages"] = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "x", "name": "me"},
        {"role": "assistant", "content": "y", "refusal": None},
        {"role": "user", "content": ""},
    ]
    reply = await shared.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"demo","prompt":[' + b"1," * 2**22 + b"1]}",
        b'{"model":"demo","prompt":[' + b'"a",' * 2**21 + b'"a"]}',
        b'{"model":"demo","prompt":"' + b"word " * 2**22 + b'"}',
        b'{"model":"demo","messages":[' + b'{"role":"user","content":"a"},' * 2**18 + b'{"role":"user","content":""}]}',
        b'{"model":"demo","messages":[],"metadata":[' + b"[]," * 2**22 + b"[]]}",
    ],
    ids=["ids", "prompts", "text", "messages", "metadata"],
)
async def test_megabytes_do_not_hold_up_the_others(shared: Cluster, body: bytes) -> None:
    path = "/v1/chat/completions" if b"messages" in body[:30] else "/v1/completions"
    slowest, stop = 0.0, False  # of this thread's own time: what others do to the machine does not count

    async def beat() -> None:
        nonlocal slowest
        while not stop:
            before = time.thread_time()
            await asyncio.sleep(0.005)
            slowest = max(slowest, time.thread_time() - before)

    beating = asyncio.create_task(beat())
    reply = await shared.http.post(path, content=body, headers={"content-type": "application/json"})
    stop = True
    await beating
    assert reply.status_code == 400
    assert slowest < 1


async def test_streams_next_to_hostile_requests_are_unharmed(shared: Cluster) -> None:
    async def stream() -> str:
        body = {**TEXT, "temperature": 0, "max_tokens": 100, "stream": True}
        reply = await shared.http.post("/v1/completions", json=body)
        events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    alone = await stream()
    hostile = [
        shared.http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
        for path, body, *_ in CASES
    ]
    several = asyncio.gather(*(stream() for _ in range(4)))
    await asyncio.gather(*hostile)
    assert set(await several) == {alone}
