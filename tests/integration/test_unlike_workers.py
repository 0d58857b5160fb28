"""Prefill and decode workers whose caches differ in page size and dtype."""

from __future__ import annotations

import dataclasses
import random

import pytest

from engine_core.types import Numerics, Request, SamplingParams
from tests.mini_cluster import MiniCluster, tiny_config


@pytest.mark.parametrize(("prefill_page", "decode_page", "dtype"), [(4, 12, "float32"), (8, 4, "bfloat16")])
async def test_answers_are_those_of_a_colocated_worker(prefill_page, decode_page, dtype):
    """Page sizes: the same tokens. A prefill worker of another dtype computes other bits: most of the tokens."""
    config = tiny_config(Numerics.FAST, page_size=decode_page)
    model = dataclasses.replace(config.model, dtype=dtype)
    prefill = dataclasses.replace(tiny_config(Numerics.FAST, page_size=prefill_page), model=model)
    cluster = await MiniCluster.start(config, prefill)
    try:
        assert cluster.prefill.info.fingerprint == cluster.decode.info.fingerprint
        rng = random.Random(1)
        same = total = 0
        for number in range(10):
            prompt = [rng.randrange(149) for _ in range(rng.randrange(1, 60))]
            sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
            apart = Request(f"{number:032x}", prompt, len(prompt), sampling)
            together = Request(f"{number + 100:032x}", prompt, len(prompt), sampling)
            one = await cluster.client.run(apart, cluster.decode, cluster.prefill)
            other = await cluster.client.run(together, cluster.colocated, None)
            assert one.failure is None and other.failure is None
            same += sum(map(int.__eq__, one.token_ids, other.token_ids))
            total += len(other.token_ids)
        assert same == total if dtype == "float32" else same > total // 2
        await cluster.assert_at_rest()
    finally:
        await cluster.stop()
