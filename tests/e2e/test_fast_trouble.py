"""Clients that leave, bodies that are no requests, workers that die, and the end: one cluster goes through it all.

In order: the last test stops the cluster.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.baton_process import until
from tests.e2e.clusters import BEAT_S, SETTLE_S, STOP_S, Cluster, Streaming
from tests.e2e.conftest import NUM_PAGES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LONG = 900
LOST_S = 2.0  # a worker silent for so long loses its streams


@pytest.fixture(scope="module")
def undisturbed(clusters: Any) -> str:
    return Streaming(clusters.get("fast")).text()


def test_nothing_compiles_after_warm_up(fast: Cluster) -> None:
    """Mixed traffic: lengths around every bucket's edges, every sampling feature, one and many at a time."""
    extras: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"logprobs": 5},
        {"logit_bias": {"40": 5.0}, "n": 3, "temperature": 1.0},
        {"stop": ["zz"], "stream": True},
    ]
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 300, 511, 512, 513, 700]
    bodies = [
        fast.body(prompt=[7 + (length * 3 + place) % 300 for place in range(length)], **extras[index % len(extras)])
        for index, length in enumerate(lengths * 3)
    ]
    with httpx.Client(timeout=200) as client:
        for body in bodies[: len(lengths)]:
            assert client.post(f"{fast.url}/v1/completions", json=body).status_code == 200
    done: list[int] = []
    threads = [
        threading.Thread(target=lambda body=body: done.append(_post(fast, body).status_code))  # type: ignore[misc]
        for body in bodies[len(lengths) :]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [200] * len(threads)
    metrics = fast.metrics()
    assert {worker: values["compiles_after_warmup"] for worker, values in metrics.items()} == {
        "prefill-0": 0,
        "decode-0": 0,
    }


def _post(cluster: Cluster, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=200)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["reading", "decoding"])
def test_a_client_that_leaves_frees_everything(
    fast: Cluster, stage: str, stream: bool, record_property: Callable[[str, object], None]
) -> None:
    fast.until_at_rest(NUM_PAGES)
    num_tokens, count = (1000, 64) if stage == "reading" else (20, 4)
    prompts = [[5 + (index * 11 + place) % 300 for place in range(num_tokens)] for index in range(count)]
    body = fast.body(prompt=prompts, max_tokens=1024 - num_tokens, ignore_eos=True, stream=stream)
    left = fast.num_disconnects()
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", f"{fast.url}/v1/completions", json=body, timeout=httpx.Timeout(20, read=0.3)) as reply,
    ):
        for _ in reply.iter_lines():
            raise httpx.ReadTimeout("seen enough of a stream")
    left_at = time.monotonic()
    until(lambda: fast.num_disconnects() > left, SETTLE_S)
    fast.until_at_rest(NUM_PAGES, SETTLE_S + BEAT_S + left_at - time.monotonic())
    record_property("seconds", time.monotonic() - left_at)
    assert fast.num_disconnects() == left + 1


def test_bad_requests_are_answered_and_harm_no_neighbour(fast: Cluster, undisturbed: str) -> None:
    neighbours: list[str] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            neighbours.append(Streaming(fast).text())

    neighbour = threading.Thread(target=keep_asking)
    neighbour.start()
    good = fast.body(prompt="x")
    cases: list[tuple[bytes, int]] = [
        (b"{", 400),
        (b"", 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b"[]", 400),
        (b"[" * 100_000, 400),
        (json.dumps({**good, "model": "gpt-4"}).encode(), 404),
        (json.dumps({**good, "max_tokens": "many"}).encode(), 400),
        (json.dumps({**good, "max_tokens": -1}).encode(), 400),
        (json.dumps({**good, "temperature": [1]}).encode(), 400),
        (json.dumps({**good, "temperature": 3}).encode(), 400),
        (json.dumps({**good, "prompt": ""}).encode(), 400),
        (json.dumps({**good, "prompt": {"a": 1}}).encode(), 400),
        (json.dumps({**good, "prompt": [10**6]}).encode(), 400),
        (json.dumps({**good, "prompt": [5] * 2000}).encode(), 400),
        (json.dumps({**good, "prompt": "long " * 5000}).encode(), 400),
        (json.dumps({**good, "max_tokens": 5000}).encode(), 400),
        (json.dumps({**good, "nonsense": 1}).encode(), 400),
        (b'{"prompt": "' + b"x" * (100 << 20) + b'"}', 413),
    ]
    for content, status in cases:
        for path in ("completions", "chat/completions"):
            reply = httpx.post(
                f"{fast.url}/v1/{path}", content=content, headers={"content-type": "application/json"}, timeout=60
            )
            error = reply.json()["error"]
            assert reply.status_code in (status, 400), (content[:80], reply.text)
            assert error["message"] and error["type"] == "invalid_request_error" and "Traceback" not in reply.text
            assert path == "chat/completions" or reply.status_code == status, (content[:80], reply.text)
    done.set()
    neighbour.join(200)
    assert set(neighbours) == {undisturbed}
    fast.until_at_rest(NUM_PAGES)


@pytest.mark.parametrize("worker_id", ["prefill-0", "decode-0"])
def test_a_killed_worker_is_replaced_and_its_streams_go_on(fast: Cluster, worker_id: str, undisturbed: str) -> None:
    before = fast.member(worker_id)
    stream = Streaming(fast)
    assert stream.running, "the stream was over too soon to be disturbed"
    os.kill(before["pid"], signal.SIGKILL)
    waiting = Streaming(fast)  # it needs the worker that has just died
    assert stream.text() == undisturbed
    assert waiting.text() == undisturbed
    fast.until_life(worker_id, before["incarnation"] + 1)
    assert fast.member(worker_id)["incarnation"] == before["incarnation"] + 1
    assert Streaming(fast).text() == undisturbed
    fast.until_at_rest(NUM_PAGES)
    assert all(values["compiles_after_warmup"] == 0 for values in fast.metrics().values())


@pytest.mark.parametrize("worker_id", ["prefill-0", "decode-0"])
def test_a_frozen_worker_loses_its_streams_and_is_found_again(fast: Cluster, worker_id: str, undisturbed: str) -> None:
    before = fast.member(worker_id)
    moved = fast.num_retries()
    stream = Streaming(fast)
    assert stream.running, "the stream was over too soon to be disturbed"
    os.kill(before["pid"], signal.SIGSTOP)
    try:
        waiting = Streaming(fast, wait=False)
        until(lambda: fast.num_retries() > moved, LOST_S + 2)
    finally:
        os.kill(before["pid"], signal.SIGCONT)
    assert stream.text() == undisturbed
    assert waiting.text() == undisturbed
    assert fast.member(worker_id)["pid"] == before["pid"]
    fast.until_at_rest(NUM_PAGES)


def test_a_killed_gateway_frees_its_requests_and_is_replaced(
    fast: Cluster, undisturbed: str, record_property: Callable[[str, object], None]
) -> None:
    stream = Streaming(fast)
    assert stream.running, "the stream was over too soon to be disturbed"
    pids = [m.pid for m in fast.family() if b"ServeReplica" in Path(f"/proc/{m.pid}/cmdline").read_bytes()]
    os.kill(pids[0], signal.SIGKILL)
    killed_at = time.monotonic()
    until(lambda: all(m["load"][1:3] == [0, 0] for m in fast.status()["members"]), 15)
    record_property("seconds", time.monotonic() - killed_at)
    until(lambda: _answers(fast), 90)
    with pytest.raises(AssertionError):
        stream.text()
    assert Streaming(fast).text() == undisturbed
    fast.until_at_rest(NUM_PAGES)


def _answers(cluster: Cluster) -> bool:
    try:
        return httpx.get(f"{cluster.url}/readiness").status_code == 200
    except httpx.HTTPError:
        return False


def test_sigterm_to_the_whole_group_drains(fast: Cluster, undisturbed: str) -> None:
    """As `timeout`, `make` and terminals do it: every process of the group gets the signal at once."""
    stream = Streaming(fast)
    assert stream.running
    begin = time.monotonic()
    assert fast.stop(lambda: os.killpg(fast.process.pid, signal.SIGTERM), STOP_S) == 0
    assert time.monotonic() - begin < STOP_S
    assert stream.text() == undisturbed
    assert fast.log.read_text().endswith("Stopped.\n")
