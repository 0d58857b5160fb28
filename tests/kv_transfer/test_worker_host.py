"""A worker's host when its engine fails: gateways hear of it within the bound, and nothing more is taken."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from engine_core.messages import Cancel, Decode, Donate, PeerAddress, TokenChunk
from engine_core.types import Request, Role, SamplingParams, TokenLogprobs
from engine_core.worker_stats import StatsRecorder
from kv_transfer.worker_host import WorkerHost
from tests.deploy.fakes import worker_info
from tests.mini_cluster import Client

STEP_TIMEOUT_S = 1.0


class Scheduler:
    """Ticks as it is told to."""

    num_running = num_waiting = queued_tokens = num_preemptions = 0

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.hangs = False
        self.released = threading.Event()

    def drain_samples(self) -> list[Any]:
        return []

    def cancel(self, key: Any) -> None:
        pass

    def tick(self) -> bool:
        if self.error is not None:
            raise self.error
        if self.hangs:
            self.released.wait()
        return False


async def started(scheduler: Scheduler, donor: Any = None) -> tuple[WorkerHost, Client, Any]:
    replica = SimpleNamespace(
        vocab_size=100,
        max_model_len=100,
        free_pages=9,
        compiles_after_warmup=0,
        drain_block_events=list,
        block_hashes=list,
        stats=StatsRecorder(lambda: (0, 0)),
    )
    host = WorkerHost(
        secret=None,
        scheduler=scheduler,
        accept=lambda message: None,
        on_cancel=lambda key: None,
        replica=replica,
        step_timeout_s=STEP_TIMEOUT_S,
    )
    info = await host.start("127.0.0.1", worker_info("d", 1, Role.DECODE, 0), donor)
    client = Client()
    return host, client, await client.connect(info)


def decode(name: str) -> Decode:
    return Decode(Request(name, [1, 2], 2, SamplingParams()), PeerAddress("127.0.0.1", 1, 1), 60_000)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", ["hangs", "out of memory", "bug"])
async def test_an_engine_that_fails_loses_its_requests_and_is_told_to_be_sick(
    fault: str, record_property: Callable[[str, object], None]
) -> None:
    scheduler = Scheduler()
    host, client, link = await started(scheduler)
    try:
        assert host.healthy
        link.send(decode("a"))
        await asyncio.sleep(0.05)
        failed_at = time.monotonic()
        if fault == "hangs":
            scheduler.hangs = True
        else:
            scheduler.error = MemoryError("RESOURCE_EXHAUSTED") if fault == "out of memory" else ZeroDivisionError()
        answer = client.answers["a", 0]
        async with asyncio.timeout(STEP_TIMEOUT_S + 2):
            await answer.done.wait()
        record_property("seconds", time.monotonic() - failed_at)
        assert answer.failure is not None
        assert (answer.failure.code, answer.failure.retryable) == ("worker_died", True)
        assert not host.healthy
        client.loads.clear()
        link.send(decode("b"))
        async with asyncio.timeout(10):
            await client.answers["b", 0].done.wait()
        assert client.answers["b", 0].failure.code == "worker_died"
        await asyncio.sleep(0.8)
        assert not client.loads, "a sick worker does not beat"
    finally:
        scheduler.released.set()
        await client.close()
        await host.stop()


async def test_a_request_whose_time_is_up_is_no_failed_hand_over() -> None:
    """Its gateway's time is up, too: it shall neither try again nor blame the worker."""
    host, client, link = await started(Scheduler())
    try:
        link.send(msgspec.structs.replace(decode("a"), deadline_ms=1))
        answer = client.answers["a", 0]
        async with asyncio.timeout(10):
            await answer.done.wait()
        assert answer.failure is not None
        assert (answer.failure.code, answer.failure.retryable) == ("deadline_exceeded", False)
        assert not host._owners and not host._deadlines
    finally:
        await client.close()
        await host.stop()


@pytest.mark.parametrize("order", [("much", "little"), ("little", "much")])
async def test_what_no_frame_holds_fails_alone(monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]) -> None:
    """As log probabilities of a very long prompt: others of the same step have their tokens all the same."""
    monkeypatch.setattr("kv_transfer.channel.MAX_FRAME_BYTES", 20_000)
    scheduler = Scheduler()
    host, client, link = await started(scheduler)
    try:
        for name in order:
            link.send(decode(name))
        await asyncio.sleep(0.05)
        scores = {"much": [TokenLogprobs(-1.0, (1,) * 20, (-1.0,) * 20)] * 200, "little": [TokenLogprobs(-1.0)]}
        host.emit([TokenChunk(name, 0, 0, [7], "length", prompt_logprobs=scores[name]) for name in order])
        async with asyncio.timeout(10):
            for name in order:
                await client.answers[name, 0].done.wait()
        assert client.answers["little", 0].token_ids == [7]
        failure = client.answers["much", 0].failure
        assert failure is not None
        assert (failure.code, failure.retryable) == ("invalid_value", False)
        assert not host._owners and not host._deadlines
    finally:
        await client.close()
        await host.stop()


async def test_a_donor_that_has_more_to_give_has_its_next_round_at_once() -> None:
    """Also where the scheduler sleeps; and it is told what is cancelled, and of malformed requests nothing."""

    class Giver:
        def __init__(self) -> None:
            self.rounds, self.taken, self.given_up = 0, [], []

        def add(self, message: Donate) -> None:
            self.taken.append(message.request.request_id)
            self.rounds = 100

        def give_up(self, key: Any, error: Exception) -> None:
            self.given_up.append(key)

        def tick(self, *, wait: bool) -> bool:
            self.rounds -= self.rounds > 0
            return self.rounds > 0

    giver = Giver()
    host, client, link = await started(Scheduler(), giver)
    try:
        link.send(Donate(Request("x", [2**40], 1, SamplingParams()), 1, 60_000))
        host.draining = True
        link.send(Donate(Request("a", [1, 2], 2, SamplingParams()), 1, 60_000))
        async with asyncio.timeout(5):  # 25 s, where each round waits for the next idle tick
            while not giver.taken or giver.rounds:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        link.send(Cancel("a", 0))
        async with asyncio.timeout(5):
            while not giver.given_up:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert giver.taken == ["a"] and giver.given_up == [("a", 0)]
    finally:
        await client.close()
        await host.stop()


async def test_an_idle_engine_does_not_hang() -> None:
    host, client, _ = await started(Scheduler())
    await asyncio.sleep(2 * STEP_TIMEOUT_S)
    assert host.healthy and client.loads
    await client.close()
    await host.stop()


async def test_time_in_which_the_whole_process_stood_still_is_no_hang() -> None:
    host, client, _ = await started(Scheduler())
    host._watch_steps(0.0)
    host._watch_steps(60 * STEP_TIMEOUT_S)  # the loop was held up for so long, and the engine with it
    assert host.healthy
    await client.close()
    await host.stop()
