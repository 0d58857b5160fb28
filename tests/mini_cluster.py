"""Real workers of a tiny model in this process, and a bare client in a gateway's place."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from decode_worker.worker import DecodeWorker
from engine_core.config import BatchConfig, CacheConfig, EngineConfig, ModelConfig
from engine_core.messages import (
    BlockEvents,
    BlockSnapshot,
    Cancel,
    Decode,
    Donate,
    Failed,
    Load,
    Measured,
    PeerAddress,
    Prefill,
    TokenChunk,
    Tokens,
    WorkerInfo,
    WorkerStats,
)
from engine_core.types import Numerics, Request
from kv_transfer.control import ControlClient
from prefill_worker.worker import PrefillWorker

GOLDEN = Path(__file__).parent / "golden"
DEADLINE_MS = 60_000


def tiny_config(numerics: Numerics, *, num_pages: int = 64, num_slots: int = 4, **changes) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path=str(GOLDEN / "qwen3")),
        cache=CacheConfig(num_pages=num_pages, page_size=changes.pop("page_size", 4)),
        batch=BatchConfig(num_slots=num_slots, max_model_len=120, prefill_tokens=16, prefill_seqs=2, strict_rows=8),
        numerics=numerics,
        compile_cache="",
        **changes,
    )


@dataclass
class Answer:
    """What came back for one request, in any order."""

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, object] = field(default_factory=dict)
    prompt_logprobs: list = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: str | None = None
    failure: Failed | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, chunk: TokenChunk) -> None:
        for i, token in enumerate(chunk.token_ids):
            assert chunk.position + i not in self.tokens, "a token came twice"
            self.tokens[chunk.position + i] = token
            if chunk.logprobs:
                self.logprobs[chunk.position + i] = chunk.logprobs[i]
        self.prompt_logprobs += chunk.prompt_logprobs
        self.cached_tokens = max(self.cached_tokens, chunk.cached_tokens)
        if chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason
            self.last = chunk.position + len(chunk.token_ids)
        if self.finish_reason is not None and len(self.tokens) == self.last:
            self.done.set()

    @property
    def token_ids(self) -> list[int]:
        assert sorted(self.tokens) == list(range(len(self.tokens))), "a gap"
        return [self.tokens[i] for i in range(len(self.tokens))]


class Client:
    """Connections to workers; answers by (request_id, epoch)."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, int], Answer] = defaultdict(Answer)
        self.loads: dict[str, Load] = {}
        self.stats: dict[str, WorkerStats] = {}
        self._clients: list[ControlClient] = []

    async def connect(self, info: WorkerInfo) -> ControlClient:
        client = ControlClient(info.address, "test", None, self)
        client.start()
        await client.wait_connected()
        self._clients.append(client)
        return client

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def run(
        self,
        request: Request,
        decode: ControlClient,
        prefill: ControlClient | None,
        donor: ControlClient | None = None,
        donor_blocks: int = 0,
    ) -> Answer:
        answer = self.start(request, decode, prefill, donor, donor_blocks)
        await asyncio.wait_for(answer.done.wait(), 60)
        return answer

    def start(
        self,
        request: Request,
        decode: ControlClient,
        prefill: ControlClient | None,
        donor: ControlClient | None = None,
        donor_blocks: int = 0,
    ) -> Answer:
        decode.send(Decode(request, prefill.info.address if prefill else None, DEADLINE_MS))
        if prefill is not None:
            prefill.send(Prefill(request, DEADLINE_MS, donor.info.address if donor else None, donor_blocks))
        if donor is not None:
            donor.send(Donate(request, donor_blocks, DEADLINE_MS))
        return self.answers[request.request_id, request.epoch]

    def cancel(self, request: Request, *workers: ControlClient) -> None:
        for worker in workers:
            worker.send(Cancel(request.request_id, request.epoch))

    def on_connected(self, client, info) -> None:
        pass

    def on_tokens(self, client, message: Tokens) -> None:
        for chunk in message.chunks:
            self.answers[chunk.request_id, chunk.epoch].take(chunk)

    def on_failed(self, client, message: Failed) -> None:
        answer = self.answers[message.request_id, message.epoch]
        answer.failure = message
        answer.done.set()

    def on_load(self, client, message: Load) -> None:
        self.loads[client.info.worker_id] = message

    def on_measured(self, client, message: Measured) -> None:
        pass

    def on_blocks(self, client, message: BlockEvents | BlockSnapshot) -> None:
        pass

    def on_stats(self, client, message: WorkerStats) -> None:
        self.stats[client.info.worker_id] = message

    def on_lost(self, client, error) -> None:
        pass


@dataclass
class MiniCluster:
    """One prefill worker, the decode worker it feeds, and a colocated decode worker, with connections to each."""

    client: Client
    workers: list[PrefillWorker | DecodeWorker]
    prefill: ControlClient
    decode: ControlClient
    colocated: ControlClient

    @classmethod
    async def start(cls, config: EngineConfig, prefill_config: EngineConfig | None = None) -> MiniCluster:
        model = Path(config.model.path)
        kinds = [
            ("p", PrefillWorker, prefill_config or config),
            ("d", DecodeWorker, config),
            ("c", DecodeWorker, config),
        ]
        workers = [kind(own, model, name, 1, PeerAddress("127.0.0.1", 0, 0)) for name, kind, own in kinds]
        client = Client()
        connections = [await client.connect(await worker.start()) for worker in workers]
        return cls(client, workers, *connections)

    async def stop(self) -> None:
        await self.client.close()
        for worker in self.workers:
            await worker.stop()

    @property
    def num_compiles(self) -> int:
        """Compilations in this process since the first worker was warm, those of other workers' warm-up included."""
        return self.workers[0].load().compiles_after_warmup

    async def assert_at_rest(self, within_s: float = 1.0) -> None:
        """Within a second no worker holds a page, a slot or a request."""
        deadline = asyncio.get_running_loop().time() + within_s
        while not all(self._is_at_rest(worker) for worker in self.workers):
            assert asyncio.get_running_loop().time() < deadline, [worker.load() for worker in self.workers]
            await asyncio.sleep(0.02)

    @staticmethod
    def _is_at_rest(worker: PrefillWorker | DecodeWorker) -> bool:
        load = worker.load()
        memory = worker._replica.memory
        return (
            load.running == load.waiting == 0
            and load.free_pages == sum(shard.cache.pool.num_pages for shard in memory.shards)
            and all(shard.table.num_free == shard.table.num_slots for shard in memory.shards)
            and all(shard.num_sequences == 0 for shard in memory.shards)
        )


def damage_copies(monkeypatch, sender, block_index: int) -> list:
    """Flip a bit of that block in the sender's memory, once, behind the digest: every frame of it is wrong after that.

    Returns what was damaged: empty until then.
    """
    damaged: list = []
    stage = sender._stage

    def stage_and_damage(blocks):
        push = stage(blocks)
        if block_index in push.indices and not damaged:
            damaged.append(push)
            memory, _ = sender._loans[push.loan]
            memory[len(memory) // 2] ^= 1
        return push

    monkeypatch.setattr(sender, "_stage", stage_and_damage)
    return damaged
