"""The gateway's placement from outside: headers, explanations, the queue, and an index fed over real sockets."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import islice
from pathlib import Path

import pytest

from deploy import explain
from engine_core.errors import ConfigError
from engine_core.messages import Load, Prefill
from router.block_feed import FeedState
from router.config import GatewayConfig
from router.server import block_salt
from router.service import IDS_AT_ONCE, _draw_ids
from tests.router.conftest import Cluster, run_cluster

BODY = {"model": "demo", "prompt": list(range(3, 100)), "temperature": 0, "max_tokens": 8}


async def post(cluster: Cluster, **headers: str):
    return await cluster.http.post(
        "/v1/completions", json=BODY, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


def test_request_ids_are_128_bits_in_hex_each_another() -> None:
    ids = list(islice(_draw_ids(), 3 * IDS_AT_ONCE))
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)


async def test_debug_header_names_the_workers_for_those_who_ask(cluster: Cluster) -> None:
    assert "x-baton-placement" not in (await post(cluster)).headers
    placed = (await post(cluster, x_baton_debug="1")).headers["x-baton-placement"]
    assert placed.startswith("prefill=prefill-0.1; decode=decode-0.1; held_prefill=0; held_decode=0; ttft_ms=")
    reply = await cluster.http.post("/v1/completions", json={**BODY, "stream": True}, headers={"x-baton-debug": "1"})
    assert "decode=decode-0.1" in reply.headers["x-baton-placement"]


async def test_explains_a_request_attempt_by_attempt(
    model_dir: Path, answer_ids: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    async with run_cluster(model_dir, answer_ids, prefill=1, decode=2) as cluster:
        cluster.decode[0].fail = 1
        request_id = ""
        while cluster.decode[0].fail:
            request_id = (await post(cluster)).json()["id"]
        url = f"http://127.0.0.1:{cluster.gateway.port}/v1"
        status = await asyncio.to_thread(explain.run, url, request_id, None, False)
        shown = capsys.readouterr().out
        assert status == 0
        assert "attempt 1: 97 tokens" in shown
        assert "attempt 2: 97 tokens" in shown
        assert "not considered: decode-0.1: failed this request" in shown
        assert shown.count("-> ") == 2
        with pytest.raises(ConfigError, match="does not know the request"):
            await asyncio.to_thread(explain.run, url, "cmpl-feed", None, False)
    with pytest.raises(ConfigError, match="no gateway answers"):
        explain.run("http://127.0.0.1:1/v1", "x", None, False)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("x-priority", "high", "must be an integer"),
        ("x-priority", "1000", "-100..100"),
        ("x-ttft-deadline-ms", "0", "must be in 1"),
        ("x-session-id", "s" * 300, "at most 256"),
    ],
)
async def test_headers_that_cannot_be_are_named(cluster: Cluster, name: str, value: str, text: str) -> None:
    reply = await cluster.http.post("/v1/completions", json=BODY, headers={name: value})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, name)
    assert text in error["message"]


async def test_the_salt_of_block_names_is_secret_and_of_one_cluster(cluster: Cluster) -> None:
    ours = block_salt(GatewayConfig(block_salt="run"), b"secret")
    assert ours == block_salt(GatewayConfig(block_salt="run"), b"secret")
    assert len({ours, block_salt(GatewayConfig(block_salt="other"), b"secret"), block_salt(GatewayConfig(), None)}) == 3
    assert len(ours) == 16
    assert json.loads((await cluster.http.get("/config")).text)["block_salt"] is False
    assert GatewayConfig(block_salt="hidden").public()["block_salt"] is True
    await post(cluster)
    assert cluster.prefill[0].requests()[0].salt == block_salt(GatewayConfig(), None)


async def test_blocks_are_found_over_the_wire(model_dir: Path, answer_ids: list[int]) -> None:
    """A worker that announces its cache is asked for a snapshot; requests then go to the one that holds the prompt."""
    async with run_cluster(model_dir, answer_ids, prefill=3, decode=1, block_namespace="ab" * 16) as cluster:
        feeds = [worker.feed for worker in cluster.service.registry.workers.values()]
        await cluster.until(lambda: all(feed.state is FeedState.LIVE for feed in feeds))
        cluster.prefill[1].publish(BODY["prompt"], cluster.service.salt)
        await cluster.until(lambda: len(cluster.service.index) >= 6)
        for _ in range(3):
            reply = await post(cluster, x_baton_debug="1")
            assert "prefill=prefill-1.1; decode=decode-0.1; held_prefill=96" in reply.headers["x-baton-placement"]


async def test_requests_wait_for_room_and_leave_with_their_client(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids) as cluster:
        cluster.decode[0].beat(Load(8, 100, 0, 100, False, 0))
        await cluster.until(lambda: cluster.service.registry.decode[0].load.waiting == 100)
        calls = [asyncio.create_task(post(cluster)) for _ in range(3)]
        await cluster.until(lambda: len(cluster.service._waiting) == 3)
        assert not any(isinstance(message, Prefill) for message in cluster.prefill[0].received)
        calls[1].cancel()
        await cluster.until(lambda: len(cluster.service._waiting) == 2)
        assert "baton_requests_waiting 2.0" in (await cluster.http.get("/metrics")).text
        cluster.decode[0].beat(Load(0, 0, 0, 100, False, 0))
        replies = await asyncio.gather(calls[0], calls[2])
        assert {reply.status_code for reply in replies} == {200}
        assert not cluster.service._waiting
        assert not cluster.service._streams


async def test_those_that_wait_too_long_are_told_when_to_come_back(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, max_waiting=1) as cluster:
        cluster.decode[0].beat(Load(8, 100, 0, 100, False, 0))
        await cluster.until(lambda: cluster.service.registry.decode[0].load.waiting == 100)
        first = asyncio.create_task(post(cluster, x_ttft_deadline_ms="700"))
        await cluster.until(lambda: len(cluster.service._waiting) == 1)
        second = await post(cluster)
        assert (second.status_code, second.headers["x-baton-refused"]) == (429, "queue_full")
        urgent = asyncio.create_task(post(cluster, x_priority="5", x_ttft_deadline_ms="800"))
        pushed_out = await first
        assert (pushed_out.status_code, pushed_out.headers["x-baton-refused"]) == (429, "queue_full")
        late = await urgent
        assert (late.status_code, late.headers["x-baton-refused"]) == (429, "deadline")
        assert int(late.headers["retry-after"]) >= 1
        metrics = (await cluster.http.get("/metrics")).text
        assert 'baton_refused_requests_total{reason="queue_full"} 2.0' in metrics
        assert 'baton_choices_total{finish_reason="cancelled"} 0.0' in metrics, "no client left"
        assert "baton_request_generation_tokens_count 0.0" in metrics, "nothing has ended that never began"
        assert not cluster.service.slow_requests.slowest()
        assert not cluster.service._waiting
        assert not cluster.service._streams


async def test_a_deadline_that_no_worker_can_meet_is_refused_before_any_work(cluster: Cluster) -> None:
    cluster.prefill[0].beat(Load(1, 0, 500_000, 100, False, 0))
    await cluster.until(lambda: cluster.service.registry.prefill[0].load.queued_tokens == 500_000)
    reply = await post(cluster, x_ttft_deadline_ms="200")
    assert (reply.status_code, reply.headers["x-baton-refused"]) == (429, "deadline")
    assert not cluster.prefill[0].received
    cluster.prefill[0].beat(Load(1, 0, 10_000, 100, False, 0))  # room, and too late all the same
    await cluster.until(lambda: cluster.service.registry.prefill[0].load.queued_tokens == 10_000)
    assert (await post(cluster, x_ttft_deadline_ms="200")).headers["x-baton-refused"] == "deadline"
    cluster.prefill[0].beat(Load(0, 0, 0, 100, False, 0))
    await cluster.until(lambda: cluster.service.registry.prefill[0].load.queued_tokens == 0)
    assert (await post(cluster, x_ttft_deadline_ms="60000")).status_code == 200


async def test_a_queue_without_workers_ends_with_503(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, max_wait_s=0.4) as cluster:
        cluster.decode[0].beat(Load(8, 100, 0, 100, False, 0))
        await cluster.until(lambda: cluster.service.registry.decode[0].load.waiting == 100)
        call = asyncio.create_task(post(cluster))
        await cluster.until(lambda: len(cluster.service._waiting) == 1)
        await cluster.decode[0].stop()
        reply = await call
        assert (reply.status_code, reply.headers["x-baton-refused"]) == (503, "no_worker")


async def test_a_worker_that_fails_in_a_row_is_left_alone(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, prefill=1, decode=2) as cluster:
        broken = cluster.decode[0]
        broken.fail, broken.fail_code = 1000, "internal_error"
        for _ in range(12):
            assert (await post(cluster)).status_code == 200
        assert 1000 - broken.fail <= 4
        metrics = (await cluster.http.get("/metrics")).text
        assert 'baton_breaker_closed{role="decode",worker="decode-0"} 0.0' in metrics
