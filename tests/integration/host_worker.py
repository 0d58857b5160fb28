"""Run by test_hosts, one process for each host of a worker: its first serves and prints what it answers.

python -m tests.integration.host_worker decode|prefill NUMBER NUM_HOSTS LINK_PORT COORDINATOR_PORT COMPILE_CACHE
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import jax

from decode_worker.follower import DecodeFollower
from decode_worker.worker import DecodeWorker
from engine_core import distributed
from engine_core.config import EngineConfig, ModelConfig
from engine_core.messages import PeerAddress
from engine_core.types import Numerics, Request, SamplingParams
from kv_transfer.host_links import HostLinks
from kv_transfer.leader_link import LeaderLink
from tests.mini_cluster import GOLDEN, Client, tiny_config

TIMEOUT_S = 60.0
LOST = 3


def config(cache: str) -> EngineConfig:
    """Four KV heads on four devices, few buckets."""
    tiny = tiny_config(Numerics.FAST, tp=4)
    model = ModelConfig(path=str(GOLDEN / "mistral"), layers="scan")
    batch = replace(tiny.batch, num_slots=2, prefill_tokens=8)
    return replace(tiny, model=model, batch=batch, compile_cache=cache)


def requests(name: str) -> list[Request]:
    """More than there are slots; some sampled, some with penalties."""
    found = []
    for i in range(5):
        prompt = [(7 * i + 11 * j) % 149 for j in range(3 + 6 * i)]
        drawn = {"temperature": 0.8, "seed": i, "repetition_penalty": 1.2} if i % 2 else {"temperature": 0.0}
        sampling = SamplingParams(max_tokens=8, ignore_eos=True, **drawn)
        found.append(Request(f"{name}-{i}", prompt, len(prompt), sampling))
    return found


def end(reason: str) -> None:
    print(reason, flush=True)
    os._exit(LOST)


async def serve_alone(num_hosts: int, hosts: HostLinks | None, cache: str) -> None:
    """Answer all requests on one worker that computes its own prompts, then wait for the end of standard input."""
    own = config(cache)
    make = lambda: DecodeWorker(  # noqa: E731
        own, Path(own.model.path), "w", 1, PeerAddress("127.0.0.1", 0, 0), **({"hosts": hosts} if hosts else {})
    )
    worker = await asyncio.to_thread(make)
    client = Client()
    connection = await client.connect(await worker.start())
    answers = await asyncio.gather(*(client.run(request, connection, None) for request in requests("r")))
    assert all(answer.failure is None for answer in answers), [answer.failure for answer in answers]
    assert worker.load().compiles_after_warmup == 0
    for answer in answers:
        print(" ".join(map(str, answer.token_ids)), flush=True)
    print("served", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await client.close()
    await worker.stop()


async def follow(link: LeaderLink, cache: str) -> None:
    own = config(cache)
    follower = await asyncio.to_thread(lambda: DecodeFollower(own, Path(own.model.path), link, lambda _: None))
    await follower.start()
    print("follows", flush=True)
    await asyncio.Event().wait()


def main(case: str, number: int, num_hosts: int, port: int, coordinator: int, cache: str) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // num_hosts)
    if num_hosts == 1:
        asyncio.run(serve_alone(1, None, cache))
        return
    if number == 0:
        hosts = HostLinks("w", 1, num_hosts, b"secret", end)
        hosts.listen("127.0.0.1", port)
        hosts.wait_connected(TIMEOUT_S)
        distributed.join(f"127.0.0.1:{coordinator}", num_hosts, 0, TIMEOUT_S)
        asyncio.run(serve_alone(num_hosts, hosts, cache))
    else:
        link = LeaderLink("w", 1, number, b"secret", end)
        link.connect("127.0.0.1", port, TIMEOUT_S)
        distributed.join(f"127.0.0.1:{coordinator}", num_hosts, number, TIMEOUT_S)
        asyncio.run(follow(link, cache))
    os._exit(0)  # the processes of a JAX program wait for each other when they end in order


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6])
