"""Run by test_row_shards: workers over virtual CPU devices, which must be asked for before jax starts.

python -m tests.integration.row_shards_cluster CASE COMPILE_CACHE

Prints each request's tokens: handed over between split workers, of one split worker, of one device.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import jax

from decode_worker.worker import DecodeWorker
from engine_core.config import EngineConfig, ModelConfig
from engine_core.messages import PeerAddress
from engine_core.types import Numerics, Request, SamplingParams
from tests.mini_cluster import GOLDEN, Answer, Client, MiniCluster, tiny_config

CASES = {
    "dp": ("qwen3", Numerics.STRICT, {"dp": 2}, {"dp": 2}),
    "ep": ("qwen3_moe", Numerics.FAST, {"ep": 2}, {"ep": 2}),
    "tp x dp": ("qwen3", Numerics.FAST, {"tp": 2, "dp": 2}, {}),  # and its prefill worker has one device
}


def config(model: str, numerics: Numerics, degrees: dict[str, int], compile_cache: str) -> EngineConfig:
    model_config = ModelConfig(path=str(GOLDEN / model), layers="scan")  # compiles faster
    return replace(tiny_config(numerics, **degrees), model=model_config, compile_cache=compile_cache)


def requests(name: str) -> list[Request]:
    """Two families of prompts, each with a common beginning; some sampled with penalties; more than there are slots."""
    found = []
    for i in range(8):
        prompt = [(3 * j + i % 2) % 149 for j in range(8)] + [(7 * i + 11 * j) % 149 for j in range(1 + 4 * i)]
        drawn = {"temperature": 0.8, "seed": i, "repetition_penalty": 1.2} if i % 3 == 2 else {"temperature": 0.0}
        sampling = SamplingParams(max_tokens=12, ignore_eos=True, **drawn)
        found.append(Request(f"{name}-{i}", prompt, len(prompt), sampling))
    return found


async def answers(cluster: MiniCluster, name: str, *, apart: bool) -> list[str]:
    """All at once where one worker computes, so that every row shard has some.

    Two workers of one process must not both run collectives: programs that reach the devices in unlike orders would
    wait for each other for ever.
    """
    decode, prefill = (cluster.decode, cluster.prefill) if apart else (cluster.colocated, None)
    limit = asyncio.Semaphore(1 if apart else 8)

    async def run(request: Request) -> Answer:
        async with limit:
            return await cluster.client.run(request, decode, prefill)

    found = await asyncio.gather(*map(run, requests(name)))
    assert all(answer.failure is None for answer in found), [answer.failure for answer in found]
    return [" ".join(map(str, answer.token_ids)) for answer in found]


async def answers_of_one_device(config: EngineConfig) -> list[str]:
    worker = DecodeWorker(config, Path(config.model.path), "whole", 1, PeerAddress("127.0.0.1", 0, 0))
    client = Client()
    connection = await client.connect(await worker.start())
    found = await asyncio.gather(*(client.run(request, connection, None) for request in requests("whole")))
    await client.close()
    await worker.stop()
    return [" ".join(map(str, answer.token_ids)) for answer in found]


async def run(name: str, cache: str) -> None:
    model, numerics, degrees, prefill_degrees = CASES[name]
    expected = await answers_of_one_device(config(model, numerics, {}, cache))
    own, feeding = config(model, numerics, degrees, cache), config(model, numerics, prefill_degrees, cache)
    cluster = await MiniCluster.start(own, feeding)
    compiles = cluster.num_compiles
    apart = await answers(cluster, "apart", apart=True)
    together = await answers(cluster, "together", apart=False)
    again = await answers(cluster, "again", apart=True)  # from the prefix caches
    assert again == apart
    assert cluster.num_compiles == compiles, cluster.num_compiles - compiles
    await cluster.assert_at_rest()
    for worker in cluster.workers:
        memory = worker._replica.memory
        assert all(len(shard.cache) > 0 for shard in memory.shards), "a row shard was never used"
        for shard in memory.shards:
            shard.cache.check_integrity()
            shard.cache.pool.check_integrity(dict.fromkeys(shard.cache.pages(), 1))
    await cluster.stop()
    for lines in zip(apart, together, expected, strict=True):
        print(" | ".join(lines))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    asyncio.run(run(*sys.argv[1:]))
