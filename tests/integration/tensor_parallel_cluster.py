"""Run by test_tensor_parallel: workers over two virtual CPU devices, which must be asked for before jax starts."""

from __future__ import annotations

import asyncio

import jax

from engine_core.types import Numerics, Request, SamplingParams
from tests.mini_cluster import MiniCluster, tiny_config


async def main() -> None:
    cluster = await MiniCluster.start(tiny_config(Numerics.STRICT, tp=2))
    compiles = cluster.num_compiles
    for i in range(6):
        prompt = [(7 * i + 11 * j) % 149 for j in range(3 + 9 * i)]
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        request = Request(f"{i:032x}", prompt, len(prompt), sampling)
        apart = await cluster.client.run(request, cluster.decode, cluster.prefill)
        again = Request(f"{i + 100:032x}", prompt, len(prompt), sampling)
        together = await cluster.client.run(again, cluster.colocated, None)
        assert apart.failure is None and together.failure is None
        print(" ".join(map(str, apart.token_ids)), "|", " ".join(map(str, together.token_ids)))
    assert cluster.num_compiles == compiles, cluster.num_compiles - compiles
    await cluster.assert_at_rest()
    await cluster.stop()


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    asyncio.run(main())
