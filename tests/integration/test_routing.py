"""A gateway's service in front of real workers of a real tiny model: requests go where their blocks are.

The index is advice: whatever is dropped on purpose or dies, answers are those of a worker that nobody routed to.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from decode_worker.worker import DecodeWorker
from engine_core.messages import BlockEvents, PeerAddress
from engine_core.types import Numerics, Request, SamplingParams
from prefill_worker.worker import PrefillWorker
from router.block_feed import FeedState
from router.clients import connect_with
from router.config import GatewayConfig
from router.placement import Placement
from router.registry import WorkerState
from router.service import Service
from router.wishes import NO_WISHES
from tests.mini_cluster import tiny_config
from tests.router.test_tracing import tracing, tree

VOCAB = 149
PAGE = 4
CONFIG = tiny_config(Numerics.STRICT, num_pages=256, page_size=PAGE)
Worker = PrefillWorker | DecodeWorker


def text(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(num_tokens)]


async def start_worker(name: str, incarnation: int = 1) -> Worker:
    kind = PrefillWorker if name.startswith("p") else DecodeWorker
    worker = kind(CONFIG, Path(CONFIG.model.path), name, incarnation, PeerAddress("127.0.0.1", 0, 0))
    await worker.start()
    return worker


class Routed:
    """The service, its workers, and what came of each request."""

    def __init__(self, workers: list[Worker], **settings) -> None:
        config = GatewayConfig(**{"local_prefill_tokens": 0, **settings})
        self.workers = workers
        self.service = Service(config, None, connect_with(None, "test"), b"salt", None)
        self.placements: list[Placement] = []
        self.count = 0
        send = self.service._send

        def noted(stream, placement: Placement) -> None:
            self.placements.append(placement)
            send(stream, placement)

        self.service._send = noted

    def state(self, name: str) -> WorkerState:
        return next(w for w in self.service.registry.workers.values() if w.info.worker_id == name)

    async def until(self, condition, timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def follow(self) -> None:
        self.service.follow([worker.info() for worker in self.workers])
        await self.until(lambda: all(w.connected for w in self.service.registry.workers.values()))
        await self.settled()

    async def settled(self) -> None:
        """The index knows exactly what the workers' caches hold."""

        def agrees(worker: Worker) -> bool:
            state = self.state(worker.info().worker_id)
            held = set(worker._replica.block_hashes())
            return state.feed.state is FeedState.LIVE and held == self.known(state, held)

        await self.until(lambda: all(agrees(worker) for worker in self.workers))

    def known(self, state: WorkerState, held: set[bytes]) -> set[bytes]:
        index = self.service.index
        return {block for block in held if state.candidate.key in index.match(np.frombuffer(block[:8], "<u8"))}

    async def ask(self, tokens: list[int], max_tokens: int = 4) -> tuple[list[int], int]:
        """Generated ids, and how many prompt tokens were found in caches."""
        self.count += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = Request(f"{self.count:032x}", tokens, len(tokens), sampling, self.service.salt)
        generation = await self.service.generate([request], asyncio.get_running_loop().time(), NO_WISHES)
        ids: list[int] = []
        try:
            while len(ids) < max_tokens:
                for _, chunk in await generation.take():
                    ids += chunk.token_ids
            return ids, generation.cached_tokens(1)
        finally:
            generation.close()

    def last(self) -> tuple[str | None, str]:
        placement = self.placements[-1]
        return placement.prefill.info.worker_id if placement.prefill else None, placement.decode.info.worker_id


@asynccontextmanager
async def routed(*names: str, **settings) -> AsyncIterator[Routed]:
    workers = [await start_worker(name) for name in names]
    cluster = Routed(workers, **settings)
    cluster.service.start()
    await cluster.follow()
    try:
        yield cluster
    finally:
        await cluster.service.close()
        for worker in cluster.workers:
            await worker.stop()


@pytest.mark.slow
async def test_requests_go_where_their_blocks_are_and_answers_never_change() -> None:
    async with routed("p0", "p1", "d0", "d1") as cluster:
        truth: dict[tuple[int, ...], list[int]] = {}

        async def check(tokens: list[int]) -> int:
            ids, cached = await cluster.ask(tokens)
            assert truth.setdefault(tuple(tokens), ids) == ids
            return cached

        # A shared prefix lands where its blocks are, on both sides, and usage says so.
        prefix = text(1, 60)
        cluster.service.tracing, exporter = tracing()
        assert await check(prefix + text(2, 9)) == 0
        home = cluster.last()
        spans = exporter.get_finished_spans()
        assert tree(spans) == {
            "request of gateway": "",
            "placement wait of gateway": "request",
            f"prefill of {home[0]}": "request",
            f"queue of {home[0]}": "prefill",
            f"transfer of {home[1]}": "request",
            f"queue of {home[1]}": "transfer",
            f"decode of {home[1]}": "request",
        }
        assert all(span.end_time > span.start_time for span in spans if span.name in ("prefill", "transfer", "decode"))
        cluster.service.tracing = None
        await cluster.settled()
        for seed in range(3, 7):
            assert await check(prefix + text(seed, 9)) == 60
            assert cluster.last() == home
            await cluster.settled()
        held = cluster.placements[-1].decision.chosen
        assert held.held_prefill_tokens == held.held_decode_tokens == 60

        # Other prefixes go elsewhere, too: the first worker has been busier, however cheap its links are.
        seeds = iter(range(20, 30))
        while cluster.last()[0] == home[0]:
            await check(text(next(seeds), 65))

        # Events dropped on purpose: the gap is seen and heals.
        state, rival = cluster.state(home[0]), cluster.state(cluster.last()[0])
        on_events, dropped = state.feed.on_events, []

        def drop_some(message: BlockEvents, now: float) -> None:
            dropped.append(message) if len(dropped) < 2 else on_events(message, now)

        state.feed.on_events = drop_some
        rival.candidate.usable = False  # else it may be the cheaper one, and nothing new is said on this feed
        for seed in range(30, 36):
            await check(prefix + text(seed, 30))
        rival.candidate.usable = True
        await cluster.until(lambda: state.feed.num_gaps > 0)
        await cluster.settled()
        assert dropped

        # An index that is wrong altogether costs time only.
        index = cluster.service.index
        match = index.match
        index.match = lambda keys: {
            worker.candidate.key: len(keys) for worker in cluster.service.registry.workers.values()
        }
        for tokens in list(truth)[:4]:
            await check(list(tokens))
        index.match = lambda keys: {}
        for tokens in list(truth)[:4]:
            await check(list(tokens))
        index.match = match

        # A worker that restarts has an empty cache and a new incarnation: what the old one held is gone.
        old = next(worker for worker in cluster.workers if worker.info().worker_id == home[0])
        late = BlockEvents(home[0], 1, 10_000, 0, False, b"", b"x" * 8)
        await old.stop()
        new = await start_worker(home[0], incarnation=2)
        cluster.workers[cluster.workers.index(old)] = new
        await cluster.follow()
        state = cluster.state(home[0])
        state.feed.on_events(late, 0.0)
        assert state.feed.num_fenced == 1
        for tokens in list(truth)[:6]:
            await check(list(tokens))
        await cluster.settled()

        # Nothing stays held.
        for worker in cluster.service.registry.workers.values():
            assert (worker.candidate.reserved_requests, worker.candidate.reserved_tokens) == (0, 0)


@pytest.mark.slow
async def test_step_times_are_learned_and_prompts_are_read_locally_where_that_is_cheaper() -> None:
    async with routed("p0", "d0", local_prefill_tokens=-1) as cluster:
        for seed in range(12):
            await cluster.ask(text(seed, 40), max_tokens=8)
        candidate = cluster.state("d0").candidate
        await cluster.until(lambda: candidate.steps.is_trusted)
        assert 0 < candidate.steps.decode_s(1, 50) < 1.0
        assert None in {placement.decision.chosen.prefill for placement in cluster.placements}
        await cluster.ask(text(0, 40), max_tokens=1)
        assert cluster.placements[-1].decision.chosen.held_decode_tokens == 40 - PAGE
