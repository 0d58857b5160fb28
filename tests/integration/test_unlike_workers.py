"""Prefill and decode workers whose caches differ in page size and dtype."""

from __future__ import annotations

import dataclasses
import random

import pytest

from engine_core.config import ModelConfig
from engine_core.types import Numerics, Request, SamplingParams
from tests.mini_cluster import Answer, MiniCluster, tiny_config
from tests.scaled_checkpoint import scaled_checkpoint

FLOAT8 = "float8_e4m3fn"


async def answers(cluster: MiniCluster, seed: int, num_requests: int, max_tokens: int) -> list[tuple[Answer, Answer]]:
    """Of greedy requests: of the two unlike workers together, and of the colocated one."""
    rng = random.Random(seed)
    found = []
    for number in range(num_requests):
        prompt = [rng.randrange(149) for _ in range(rng.randrange(1, 60))]
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        apart = Request(f"{number:032x}", prompt, len(prompt), sampling)
        together = Request(f"{number + 100:032x}", prompt, len(prompt), sampling)
        one = await cluster.client.run(apart, cluster.decode, cluster.prefill)
        found.append((one, await cluster.client.run(together, cluster.colocated, None)))
    return found


@pytest.mark.parametrize(
    ("prefill_cache", "decode_cache", "numerics"),
    [("auto", FLOAT8, Numerics.FAST), (FLOAT8, "auto", Numerics.FAST), (FLOAT8, FLOAT8, Numerics.STRICT)],
)
async def test_float8_caches(prefill_cache, decode_cache, numerics, tmp_path):
    """Of one or both workers: the answers of a colocated worker, or many of their tokens where KV is rounded.

    Of a model whose KV no float8 cache could hold, but for the units that lie beside its weights.
    """
    model = ModelConfig(path=str(scaled_checkpoint(tmp_path / "scaled")))
    plain = dataclasses.replace(tiny_config(numerics), model=model)
    config = plain
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, dtype=decode_cache))
    page_size = 4 if numerics is Numerics.STRICT else 8
    cache = dataclasses.replace(plain.cache, dtype=prefill_cache, page_size=page_size)
    prefill = dataclasses.replace(plain, cache=cache)
    cluster = await MiniCluster.start(config, prefill)
    try:
        stored = [worker._replica.resolved.layout.dtype for worker in cluster.workers[:2]]
        assert stored == [name.replace("auto", "float32") for name in (prefill_cache, decode_cache)]
        same = total = 0
        for one, other in await answers(cluster, 2, 8, 8):
            assert one.failure is None and len(one.token_ids) == len(other.token_ids) == 8
            same += sum(map(int.__eq__, one.token_ids, other.token_ids))
            total += 8
        assert same == total if prefill_cache == decode_cache else same > total // 4
        await cluster.assert_at_rest()
    finally:
        await cluster.stop()


@pytest.mark.parametrize(("prefill_page", "decode_page", "dtype"), [(4, 12, "float32"), (8, 4, "bfloat16")])
async def test_answers_are_those_of_a_colocated_worker(prefill_page, decode_page, dtype):
    """Page sizes: the same tokens. A prefill worker of another dtype computes other bits: most of the tokens."""
    config = tiny_config(Numerics.FAST, page_size=decode_page)
    model = dataclasses.replace(config.model, dtype=dtype)
    prefill = dataclasses.replace(tiny_config(Numerics.FAST, page_size=prefill_page), model=model)
    cluster = await MiniCluster.start(config, prefill)
    try:
        assert cluster.prefill.info.fingerprint == cluster.decode.info.fingerprint
        same = total = 0
        for one, other in await answers(cluster, 1, 10, 12):
            assert one.failure is None and other.failure is None
            same += sum(map(int.__eq__, one.token_ids, other.token_ids))
            total += len(other.token_ids)
        assert same == total if dtype == "float32" else same > total // 2
        await cluster.assert_at_rest()
    finally:
        await cluster.stop()
