"""Clients that leave, workers that die: nothing stays held, no token is lost or repeated."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import openai
import pytest

from engine_core.errors import DeadlineExceeded
from engine_core.messages import Cancel, Decode, Failed, Load, PeerAddress, Prefill
from engine_core.types import Role
from router.config import GatewayConfig
from router.server import Gateway
from router.stream import Stream
from tests.fakes import FakeWorker, make_tokenizer
from tests.router.conftest import Cluster, run_cluster

BODY = {"model": "demo", "prompt": "Once upon", "temperature": 0, "max_tokens": 40}


@pytest.fixture
async def pair(model_dir: Path, answer_ids: list[int]) -> AsyncIterator[Cluster]:
    async with run_cluster(model_dir, answer_ids, prefill=2, decode=2) as running:
        yield running


def said(answer_ids: list[int], num_tokens: int) -> str:
    return make_tokenizer().decode(answer_ids[:num_tokens])


async def collect(cluster: Cluster, **extra: object) -> tuple[str, list[dict]]:
    reply = await cluster.http.post("/v1/completions", json={**BODY, "stream": True, **extra})
    assert reply.status_code == 200, reply.text
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events if "choices" in event), events


def assert_idle(cluster: Cluster) -> None:
    assert not cluster.service._streams
    for worker in cluster.service.registry.workers.values():
        reserved = worker.candidate.reserved_requests, worker.candidate.reserved_tokens
        assert (*reserved, len(worker.streams)) == (0, 0, 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["reading", "decoding"])
async def test_disconnect_cancels_on_both_workers_at_once(cluster: Cluster, stream: bool, stage: str) -> None:
    cluster.prefill[0].silent = stage == "reading"
    cluster.decode[0].step_s = 0.05
    body = {**BODY, "max_tokens": 400, "stream": stream}
    call = asyncio.create_task(cluster.http.post("/v1/completions", json=body))
    await cluster.until(lambda: bool(cluster.decode[0].active))
    if stage == "decoding":
        await cluster.until(lambda: any(len(s.journal.token_ids) > 2 for s in cluster.service._streams.values()))
    left_at = time.monotonic()
    call.cancel()
    await cluster.until(lambda: bool(cluster.decode[0].cancelled))
    if stage == "reading":
        await cluster.until(lambda: bool(cluster.prefill[0].cancelled))
    assert time.monotonic() - left_at < 3  # promised is one second, of a machine that has the time
    assert not cluster.decode[0].active
    assert_idle(cluster)
    assert cluster.service.metrics.disconnects == 1


async def test_disconnect_while_waiting_for_a_worker(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, prefill=0, decode=0, worker_wait_s=20.0) as cluster:
        call = asyncio.create_task(cluster.http.post("/v1/completions", json=BODY))
        await asyncio.sleep(0.1)
        call.cancel()
        await cluster.until(lambda: cluster.service.metrics.disconnects == 1)


async def test_no_worker_is_503(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, prefill=0, decode=0) as cluster:
        reply = await cluster.http.post("/v1/completions", json=BODY)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "no_worker_available"
        assert reply.headers["retry-after"]
        assert (await cluster.http.get("/readiness")).status_code == 503


async def test_a_further_gateway_listens_once_it_has_the_workers(cluster: Cluster, model_dir: Path) -> None:
    """It shares the port, and so the clients, from that moment."""
    another = Gateway(GatewayConfig(port=0), model_dir)
    await another.start([worker.info for worker in cluster.prefill + cluster.decode])
    try:
        assert another.service.registry.ready
    finally:
        await another.stop()


async def test_a_worker_that_cannot_be_reached_holds_up_no_gateway(
    cluster: Cluster, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.server.CONNECT_S", 0.05)
    gone = msgspec.structs.replace(cluster.prefill[0].info, worker_id="gone", address=PeerAddress("127.0.0.1", 1, 0))
    another = Gateway(GatewayConfig(port=0), model_dir)
    await another.start([gone, cluster.decode[0].info])
    try:
        assert [worker.info.worker_id for worker in another.service.registry.decode] == ["decode-0"]
        assert not another.service.registry.ready
    finally:
        await another.stop()


async def test_waits_for_a_worker_to_appear(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, prefill=0, decode=0, worker_wait_s=5.0) as cluster:
        call = asyncio.create_task(cluster.http.post("/v1/completions", json=BODY))
        await asyncio.sleep(0.05)
        worker = await FakeWorker(Role.DECODE, "late", answer_ids).start()
        cluster.gateway.follow([worker.info])
        assert (await call).json()["choices"][0]["text"] == said(answer_ids, 40)
        await worker.stop()


@pytest.mark.parametrize("died", ["decode", "prefill"])
@pytest.mark.parametrize("position", [0, 1, 17])
async def test_worker_death_is_invisible(pair: Cluster, answer_ids: list[int], died: str, position: int) -> None:
    """Whichever worker dies, at whatever point: the stream goes on elsewhere with the very next token."""
    (pair.prefill if died == "prefill" else pair.decode)[0].die_at = position
    texts = await asyncio.gather(*(collect(pair) for _ in range(4)))
    assert {text for text, _ in texts} == {said(answer_ids, 40)}
    assert_idle(pair)
    if position == 17 and died == "decode":
        retried = [r for worker in pair.prefill for r in worker.requests() if r.epoch > 0]
        assert retried
        assert all(
            r.token_ids[r.num_prompt_tokens :] == answer_ids[: len(r.token_ids) - r.num_prompt_tokens] for r in retried
        )
        assert all(len(r.token_ids) > r.num_prompt_tokens for r in retried)


async def test_failed_and_retryable_goes_elsewhere(pair: Cluster, answer_ids: list[int]) -> None:
    pair.decode[0].fail = pair.decode[1].fail = 1
    text, _ = await collect(pair)
    assert text == said(answer_ids, 40)
    assert sum(pair.service.metrics.retries.values()) == 2
    cancels = [message for worker in pair.prefill for message in worker.received if isinstance(message, Cancel)]
    assert {message.epoch for message in cancels} <= {0, 1}
    assert_idle(pair)


async def test_gives_up_after_three_attempts(pair: Cluster) -> None:
    for worker in pair.decode:
        worker.fail = 99
    reply = await pair.http.post("/v1/completions", json=BODY)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "no_free_pages"
    epochs = [m.request.epoch for worker in pair.decode for m in worker.received if isinstance(m, Decode)]
    assert sorted(epochs) == [0, 1, 2]
    assert_idle(pair)


async def test_logits_that_are_not_finite_everywhere_are_a_clear_error(pair: Cluster) -> None:
    for worker in pair.decode:
        worker.fail, worker.fail_code = 99, "logits_not_finite"
    reply = await pair.http.post("/v1/completions", json=BODY)
    assert reply.status_code == 500
    assert (reply.json()["error"]["type"], reply.json()["error"]["code"]) == ("server_error", "logits_not_finite")
    assert all(worker.requests() for worker in pair.decode), "another worker was tried"
    breakers = [pair.service.registry.workers[worker.info.worker_id, 1].candidate.breaker for worker in pair.decode]
    assert sum(breaker._failures for breaker in breakers) == 3, "and the workers are blamed"
    assert_idle(pair)


async def test_not_retryable_is_final(pair: Cluster) -> None:
    for worker in pair.prefill:
        worker.fail, worker.fail_code, worker.fail_retryable = 1, "layout_mismatch", False
    reply = await pair.http.post("/v1/completions", json=BODY)
    assert reply.status_code == 502
    assert reply.json()["error"]["type"] == "server_error"
    assert sum(isinstance(m, Prefill) for worker in pair.prefill for m in worker.received) == 1
    await pair.until(lambda: not any(worker.active for worker in pair.decode))
    assert_idle(pair)


async def test_failure_in_mid_stream_is_one_error_event(cluster: Cluster) -> None:
    cluster.decode[0].die_at = 5
    reply = await cluster.http.post("/v1/completions", json={**BODY, "stream": True})
    events = reply.text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"]
    assert "[DONE]" not in reply.text
    assert sum('"error"' in event for event in events) == 1
    cluster.decode[0].die_at = 5
    with pytest.raises(openai.APIError):
        stream = await cluster.client.completions.create(**BODY, stream=True)
        [chunk async for chunk in stream]


async def test_first_token_may_come_last(cluster: Cluster, answer_ids: list[int]) -> None:
    cluster.prefill[0].step_s = 0.2
    await asyncio.sleep(0.01)
    text, _ = await collect(cluster)
    assert text == said(answer_ids, 40)


async def test_hung_worker_loses_its_requests(model_dir: Path, answer_ids: list[int]) -> None:
    settings = {"suspect_after_s": 0.2, "lost_after_s": 0.5}
    async with run_cluster(model_dir, answer_ids, prefill=1, decode=2, **settings) as cluster:
        cluster.decode[0].silent = True

        async def beats() -> None:
            while True:
                for worker in (cluster.prefill[0], cluster.decode[1]):
                    worker.beat(Load(0, 0, 0, 100, False, 0))
                await asyncio.sleep(0.05)

        beating = asyncio.create_task(beats())
        texts = await asyncio.gather(collect(cluster), collect(cluster))
        assert {text for text, _ in texts} == {said(answer_ids, 40)}
        cluster.decode[0].beat(Load(0, 0, 0, 100, False, 0))
        await cluster.until(lambda: len(cluster.service.registry.decode) == 2)
        beating.cancel()


async def test_deadline(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, request_timeout_s=0.2) as cluster:
        cluster.decode[0].silent = True
        reply = await cluster.http.post("/v1/completions", json=BODY)
        assert reply.status_code == 504
        await cluster.until(lambda: not cluster.decode[0].active)
        assert_idle(cluster)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_a_worker_that_says_that_the_time_is_up_has_not_failed(pair: Cluster, role: Role) -> None:
    """It is told how much is left, and so as a rule knows first: no other worker is tried, and it is not left alone."""
    workers = pair.prefill if role is Role.PREFILL else pair.decode
    for worker in workers:
        worker.fail, worker.fail_code, worker.fail_retryable = 100, "deadline_exceeded", False
    for _ in range(8):
        reply = await pair.http.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert not any(pair.service.metrics.retries.values())
    assert all(state.candidate.breaker.num_opened == 0 for state in pair.service.registry.workers.values())
    assert_idle(pair)


async def test_a_choice_whose_time_is_up_before_its_turn_is_not_placed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices are placed one after another; nobody would ever take this one back from its workers."""
    room = cluster.service._waiting
    admit = room.admit_at_once

    def admit_late(stream: Stream, *rest: object) -> bool:
        placed = admit(stream, *rest)
        for other in list(cluster.service._streams.values()):
            cluster.service._abandon_attempt(other)
            cluster.service._fail(other, DeadlineExceeded("the request took too long"))
        return placed

    monkeypatch.setattr(room, "admit_at_once", admit_late)
    reply = await cluster.http.post("/v1/completions", json={**BODY, "n": 2})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert_idle(cluster)
    assert sum(isinstance(message, Decode) for message in cluster.decode[0].received) <= 1


async def test_too_many_at_once(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, max_concurrent_choices=3) as cluster:
        reply = await cluster.http.post("/v1/completions", json={**BODY, "n": 4})
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "server_overloaded")
        assert (reply.headers["x-baton-refused"], reply.headers["retry-after"]) == ("too_many_requests", "1")
        reply = await cluster.http.post("/v1/completions", json={**BODY, "n": 3})
        assert reply.status_code == 200


async def test_drain_finishes_streams_and_takes_no_more(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids) as cluster:
        cluster.decode[0].step_s = 0.02
        call = asyncio.create_task(collect(cluster))
        await cluster.until(lambda: bool(cluster.decode[0].active))
        draining = asyncio.create_task(cluster.gateway.drain(10))
        await asyncio.sleep(0.3)
        with pytest.raises(openai.APIConnectionError):
            await cluster.client.completions.create(**BODY)
        assert (await call)[0] == said(answer_ids, 40)
        async with asyncio.timeout(15):
            await draining
        await asyncio.sleep(0.05)
        assert not any(worker._server.links for worker in cluster.prefill + cluster.decode)


async def test_what_a_drain_has_no_time_for_ends_with_an_error(model_dir: Path, answer_ids: list[int]) -> None:
    """One that waits for a worker, an answer, and a stream in the middle: each hears why, and may try elsewhere."""
    async with run_cluster(model_dir, answer_ids) as cluster:
        cluster.decode[0].step_s = 0.1
        stream = asyncio.create_task(collect(cluster, max_tokens=400))
        whole = asyncio.create_task(cluster.http.post("/v1/completions", json={**BODY, "max_tokens": 400}))
        await cluster.until(lambda: any(len(s.journal.token_ids) > 2 for s in cluster.service._streams.values()))
        cluster.decode[0].beat(Load(8, 100, 0, 100, False, 0))
        await cluster.until(lambda: cluster.service.registry.decode[0].load.waiting == 100)
        waits = asyncio.create_task(cluster.http.post("/v1/completions", json=BODY))
        await cluster.until(lambda: len(cluster.service._waiting) == 1)
        await cluster.gateway.drain(0.3)
        for reply in (await whole, await waits):
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
            assert reply.headers["retry-after"]
        text, events = await stream
        assert said(answer_ids, 400).startswith(text) and text
        assert events[-1]["error"]["code"] == "overloaded"


async def test_the_streams_of_a_worker_that_leaves_go_on_elsewhere(pair: Cluster, answer_ids: list[int]) -> None:
    for worker in pair.decode:
        worker.step_s = 0.01
    calls = [asyncio.create_task(collect(pair)) for _ in range(4)]
    await pair.until(lambda: all(worker.active for worker in pair.decode))
    pair.gateway.follow([pair.prefill[0].info, pair.decode[0].info])
    await pair.until(lambda: not pair.decode[1].active, 0.3)
    assert {text for text, _ in await asyncio.gather(*calls)} == {said(answer_ids, 40)}
    assert pair.service.metrics.retries["worker_leaving"] == sum(pair.service.metrics.retries.values()) > 0
    assert len(pair.service.registry.workers) == 2


async def test_the_last_decode_worker_that_leaves_finishes_its_streams(cluster: Cluster, answer_ids: list[int]) -> None:
    cluster.decode[0].step_s = 0.01
    call = asyncio.create_task(collect(cluster))
    await cluster.until(lambda: bool(cluster.decode[0].active))
    cluster.decode[0].beat(Load(1, 0, 0, 100, True, 0))
    assert (await call)[0] == said(answer_ids, 40)
    assert not any(cluster.service.metrics.retries.values())


@pytest.mark.parametrize("position", [0, 7])
async def test_a_request_that_kills_two_workers_is_not_tried_again(
    model_dir: Path, answer_ids: list[int], position: int
) -> None:
    async with run_cluster(model_dir, answer_ids, prefill=0, decode=3, colocated=True) as cluster:
        for worker in cluster.decode:
            worker.die_at = position
        reply = await cluster.http.post("/v1/completions", json=BODY)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (500, "poison_request")
        assert "decode-" in error["message"]
        alive = [worker for worker in cluster.decode if worker.die_at is not None]
        assert len(alive) == 1
        alive[0].die_at = None
        assert (await collect(cluster))[0] == said(answer_ids, 40), "nobody else is refused"


async def test_lost_connections_are_no_deaths(model_dir: Path, answer_ids: list[int]) -> None:
    """Workers that are back at once did not die of the request, however often their links are cut."""
    async with run_cluster(model_dir, answer_ids, prefill=0, decode=2, colocated=True) as cluster:
        for worker in cluster.decode:
            worker.step_s = 0.3
        call = asyncio.create_task(collect(cluster, max_tokens=3))
        for _ in range(2):
            await cluster.until(lambda: any(worker.active for worker in cluster.decode))
            for worker in cluster.decode:
                for channel in list(worker._server._channels):
                    channel.abort(ConnectionError("cut"))
            await cluster.until(lambda: not any(worker.active for worker in cluster.decode))
        assert (await call)[0] == said(answer_ids, 3)


async def test_a_link_that_is_lost_again_and_again_ends_no_stream(cluster: Cluster, answer_ids: list[int]) -> None:
    """More often than `max_attempts`, before a token has come; and then it is whole again."""
    for worker in cluster.prefill + cluster.decode:
        worker.step_s = 0.3
    call = asyncio.create_task(collect(cluster, max_tokens=3))
    for _ in range(6):
        await cluster.until(lambda: bool(cluster.decode[0].active))
        for channel in list(cluster.decode[0]._server._channels):
            channel.abort(ConnectionError("cut"))
        await cluster.until(lambda: not cluster.decode[0].active)
    assert (await call)[0] == said(answer_ids, 3)
    assert_idle(cluster)


async def test_a_link_that_stays_bad_ends_its_streams(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.failures.PATIENCE_S", 0.5)
    cluster.decode[0].step_s = cluster.prefill[0].step_s = 30

    async def keep_cutting() -> None:
        while True:
            await cluster.until(lambda: bool(cluster.decode[0].active))
            for channel in list(cluster.decode[0]._server._channels):
                channel.abort(ConnectionError("cut"))
            await cluster.until(lambda: not cluster.decode[0].active)

    cutting = asyncio.create_task(keep_cutting())
    reply = await cluster.http.post("/v1/completions", json=BODY)
    cutting.cancel()
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "worker_died")
    assert_idle(cluster)


async def test_attempts_that_bring_tokens_are_not_counted(pair: Cluster, answer_ids: list[int]) -> None:
    """More failures than `max_attempts`, each behind the last one's token."""
    for worker in pair.decode:
        worker.step_s = 0.02
    call = asyncio.create_task(collect(pair))
    for _ in range(5):
        await pair.until(lambda: any(worker.active for worker in pair.decode))
        journal = next(iter(pair.service._streams.values())).journal
        seen = len(journal.token_ids)
        await pair.until(lambda journal=journal, seen=seen: len(journal.token_ids) > seen + 1)
        busy = next(worker for worker in pair.decode if worker.active)
        link, request, _ = next(iter(busy.active.values()))
        link.send(Failed(request.request_id, request.epoch, "worker_died", "made to fail", True))
        await pair.until(lambda journal=journal, seen=seen: journal.start > seen)
    assert (await call)[0] == said(answer_ids, 40)
    assert sum(pair.service.metrics.retries.values()) == 5


async def test_a_retry_gets_what_is_left_of_the_time(pair: Cluster) -> None:
    for worker in pair.decode:
        worker.step_s, worker.die_at = 0.1, 2
    await pair.http.post("/v1/completions", json={**BODY, "max_tokens": 3})
    left = [m.deadline_ms for worker in pair.decode for m in worker.received if isinstance(m, Decode)]
    assert len(left) == 2 and max(left) - min(left) >= 100


async def test_a_client_that_reads_slowly_holds_up_nobody(cluster: Cluster, answer_ids: list[int]) -> None:
    """Its worker is done with it as soon as it has generated; the text waits in the gateway."""
    body = json.dumps({**BODY, "max_tokens": 450, "stream": True, "n": 8}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.gateway.port, limit=1 << 10)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    await cluster.until(lambda: bool(cluster.decode[0].active))
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    assert (await collect(cluster))[0] == said(answer_ids, 40)
    await cluster.until(lambda: not cluster.decode[0].active, 10)
    await cluster.until(lambda: not cluster.service._streams, 10)
    reader._transport.resume_reading()  # type: ignore[attr-defined]
    async with asyncio.timeout(10):
        text = b""
        while b"data: [DONE]" not in text:
            text = text[-20:] + await reader.read(1 << 16)
    writer.close()
