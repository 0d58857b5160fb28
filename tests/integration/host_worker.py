"""Run by test_hosts: a host of a worker over several, or a worker of one host.

python -m tests.integration.host_worker decode|prefill|rows NUMBER NUM_HOSTS LINK_PORT COORDINATOR_PORT COMPILE_CACHE

Host 0 prints what it answers by itself (decode, rows), then its WorkerInfo, and serves until standard input ends.

python -m tests.integration.host_worker peer COMPILE_CACHE

A worker of one device that reads the WorkerInfo of a worker of the other role, and prints what both answer together.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import jax
import msgspec
import numpy as np

from decode_worker.follower import DecodeFollower
from decode_worker.worker import DecodeWorker
from engine_core import distributed
from engine_core.config import EngineConfig, ModelConfig
from engine_core.host_commands import Export
from engine_core.messages import PeerAddress, WorkerInfo
from engine_core.types import Numerics, Request, Role, SamplingParams
from kv_transfer.control import ControlClient
from kv_transfer.host_links import HostLinks
from kv_transfer.leader_link import LeaderLink
from prefill_worker.follower import PrefillFollower
from prefill_worker.worker import PrefillWorker
from tests.mini_cluster import GOLDEN, Client, tiny_config

TIMEOUT_S = 60.0
LOST = 3
MARK = "baton: "
HERE = "127.0.0.1"
WORKERS = {"decode": DecodeWorker, "prefill": PrefillWorker, "rows": DecodeWorker}
DEGREES = {"decode": {"tp": 4}, "prefill": {"tp": 4}, "rows": {"dp": 2, "tp": 2}, "peer": {}}


def config(case: str, cache: str) -> EngineConfig:
    """Four KV heads, few buckets; workers of one device have other pages."""
    tiny = tiny_config(Numerics.FAST, page_size=8 if case == "peer" else 4, **DEGREES[case])
    model = ModelConfig(path=str(GOLDEN / "mistral"), layers="scan")
    return replace(tiny, model=model, batch=replace(tiny.batch, num_slots=2, prefill_tokens=8), compile_cache=cache)


def requests(name: str) -> list[Request]:
    """More than there are slots; some sampled, some with penalties."""
    found = []
    for i in range(5):
        prompt = [(7 * i + 11 * j) % 149 for j in range(3 + 6 * i)]
        drawn = {"temperature": 0.8, "seed": i, "repetition_penalty": 1.2} if i % 2 else {"temperature": 0.0}
        sampling = SamplingParams(max_tokens=8, ignore_eos=True, **drawn)
        found.append(Request(f"{name}-{i}", prompt, len(prompt), sampling))
    return found


def say(line: str) -> None:
    """Gloo's threads print to standard output, too, and tear each other's lines."""
    print(f"\n{MARK}{line}", flush=True)


def end(reason: str) -> None:
    say(reason)
    os._exit(LOST)


async def answer(client: Client, name: str, decode: ControlClient, prefill: ControlClient | None) -> None:
    answers = await asyncio.gather(*(client.run(request, decode, prefill) for request in requests(name)))
    assert all(found.failure is None for found in answers), [found.failure for found in answers]
    for found in answers:
        say(" ".join(map(str, found.token_ids)))


async def lead(case: str, hosts: HostLinks | None, cache: str) -> None:
    own = config(case, cache)
    several = {"hosts": hosts} if hosts is not None else {}
    make = lambda: WORKERS[case](own, Path(own.model.path), case, 1, PeerAddress(HERE, 0, 0), **several)  # noqa: E731
    worker = await asyncio.to_thread(make)
    info = await worker.start()
    client = Client()
    if case != "prefill":
        await answer(client, "alone", await client.connect(info), None)
    say(msgspec.json.encode(info).decode())
    await asyncio.to_thread(sys.stdin.readline)
    assert worker.load().compiles_after_warmup == 0
    assert worker.load().running == worker.load().waiting == 0
    await client.close()
    await worker.stop()
    say("at rest")


class TellingFollower(PrefillFollower):
    """Says how many blocks it hands over itself, and of how many KV heads."""

    def blocks(self, export: Export, layers: list[np.ndarray]) -> None:
        say(f"{len(export.blocks)} blocks of {layers[0].shape[2] // 2} heads")
        super().blocks(export, layers)


async def follow(case: str, link: LeaderLink, cache: str) -> None:
    own = config(case, cache)
    model = Path(own.model.path)
    kind = TellingFollower if case == "prefill" else DecodeFollower
    follower = await asyncio.to_thread(lambda: kind(own, model, HERE, link, lambda _: None))
    await follower.start()
    await asyncio.Event().wait()


async def be_peer(cache: str) -> None:
    """Computes for the other worker's decoding, or decodes what that computes."""
    other = msgspec.json.decode(sys.stdin.readline(), type=WorkerInfo)
    own = config("peer", cache)
    kind = PrefillWorker if other.role is Role.DECODE else DecodeWorker
    worker = kind(own, Path(own.model.path), "peer", 1, PeerAddress(HERE, 0, 0))
    client = Client()
    mine, theirs = await client.connect(await worker.start()), await client.connect(other)
    decode, prefill = (theirs, mine) if other.role is Role.DECODE else (mine, theirs)
    await answer(client, "apart", decode, prefill)
    await client.close()
    await worker.stop()
    say("done")


def main(case: str, number: int, num_hosts: int, port: int, coordinator: int, cache: str) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // num_hosts)
    if num_hosts == 1:
        asyncio.run(lead(case, None, cache))
    elif number == 0:
        hosts = HostLinks(case, 1, num_hosts, None, end)
        hosts.listen(HERE, port)
        hosts.wait_connected(TIMEOUT_S)
        distributed.join(f"{HERE}:{coordinator}", num_hosts, 0, TIMEOUT_S)
        asyncio.run(lead(case, hosts, cache))
    else:
        link = LeaderLink(case, 1, number, None, end)
        link.connect(HERE, port, TIMEOUT_S)
        distributed.join(f"{HERE}:{coordinator}", num_hosts, number, TIMEOUT_S)
        asyncio.run(follow(case, link, cache))
    os._exit(0)  # the processes of a JAX program wait for each other when they end in order


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if sys.argv[1] == "peer":
        asyncio.run(be_peer(sys.argv[2]))
    else:
        main(sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6])
