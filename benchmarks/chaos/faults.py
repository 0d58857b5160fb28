"""Seeded faults, one after another: what is killed, frozen, drained, or done to a link."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.fate import Fate
from benchmarks.chaos.proxy import FAIR, FaultProxy, Weather
from benchmarks.chaos.station import Post, Station
from engine_core.types import Role

PAUSE_S = (1.0, 3.0)  # between two faults
LINK_S = (0.5, 3.0)
FREEZE_S = (2.5, 5.0)
FREEZE_GATEWAY_S = (6.5, 9.0)  # workers hang up after 5.5 s; Serve would replace it later
BACK_S = 240.0
WEATHERS: dict[str, Weather] = {
    "delay": Weather(delay_s=0.1),
    "drip": Weather(bytes_per_s=20_000),
    "lose": Weather(lose=0.02),
    "double": Weather(double=0.02),
    "swap": Weather(swap=0.02),
    "flip": Weather(flip=0.02),
    "hold": Weather(holds=True),
}
PROCESS_FAULTS = ("kill", "freeze", "drain")
GATEWAY_FAULTS = ("kill gateway", "freeze gateway")
LINK_FAULTS = ("cut", *WEATHERS)


class Faults:
    """Does harm until told to stop, and then puts everything right.

    Attributes:
        counts: faults by kind.
        victims: workers whose process was killed, or may have been replaced because it was frozen or drained.
        killed_gateways: process ids.
    """

    def __init__(
        self, cluster: Cluster, station: Station, fate: Fate, rng: random.Random, say: Callable[[str], None]
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.victims: set[str] = set()
        self.killed_gateways: set[int] = set()
        self._fate = fate
        self._cluster = cluster
        self._station = station
        self._rng = rng
        self._say = say

    async def until(self, over: asyncio.Event) -> None:
        """A process fault only while all serve; else something happens to a link. A lone gateway is spared."""
        gateway_faults = GATEWAY_FAULTS if self._cluster.num_gateways > 1 else ()
        every = (*PROCESS_FAULTS, *gateway_faults, *LINK_FAULTS)
        kinds: list[str] = []
        while not over.is_set():
            if not kinds:  # each kind once before any comes again
                kinds = self._rng.sample(every, len(every))
            is_whole = self._cluster.is_whole(status := await self._cluster.status())
            kind = next((k for k in kinds if is_whole or k in LINK_FAULTS), self._rng.choice(LINK_FAULTS))
            if kind in kinds:
                kinds.remove(kind)
            self.counts[kind] += 1
            self._fate.latest = kind
            await self._do(kind, status)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), self._rng.uniform(*PAUSE_S))

    async def _do(self, kind: str, status: Any) -> None:
        if kind == "drain":
            await self._drain(status)
        elif kind in PROCESS_FAULTS:
            await self._worker_fault(kind, self._rng.choice(status.members))
        elif kind in GATEWAY_FAULTS:
            await self._gateway_fault(kind, self._rng.choice(sorted(self._cluster.gateways())))
        else:
            await self._link_fault(kind)

    async def _worker_fault(self, kind: str, victim: Any) -> None:
        self.victims.add(victim.worker_id)
        self._say(f"{kind} {victim.worker_id}")
        with contextlib.suppress(ProcessLookupError):
            if kind == "kill":
                os.kill(victim.pid, signal.SIGKILL)
                return
            os.kill(victim.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(self._rng.uniform(*FREEZE_S))
            finally:
                os.kill(victim.pid, signal.SIGCONT)

    async def _gateway_fault(self, kind: str, pid: int) -> None:
        self._say(f"{kind} {pid}")
        if kind == "kill gateway":
            self.killed_gateways.add(pid)
            self._fate.num_killed += 1
            os.kill(pid, signal.SIGKILL)
            while not self._cluster.is_gone(pid):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            self._fate.num_gone += 1
            return
        self._fate.num_frozen += 1
        self._fate.is_frozen = True
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._rng.uniform(*FREEZE_GATEWAY_S))
        finally:
            os.kill(pid, signal.SIGCONT)
            self._fate.is_frozen = False

    async def _drain(self, status: Any) -> None:
        """One worker fewer, and back again."""
        roles = [role for role in Role if status.wanted[role.value] > 1]
        if not roles:
            return
        role = self._rng.choice(roles)
        count = status.wanted[role.value]
        self._say(f"drain {role}-{count - 1}")
        self.victims.add(f"{role}-{count - 1}")
        await self._cluster.scale(role, count - 1)
        await self._cluster.until_ready(BACK_S)
        await self._cluster.scale(role, count)

    async def _link_fault(self, kind: str) -> None:
        post = self._rng.choice(sorted(self._station.posts.values(), key=lambda post: post.worker_id))
        name, proxy = self._rng.choice([("control", post.control), ("kv", post.kv)])
        self._say(f"{kind} on the {name} link of {post.worker_id}")
        self._fate.latest = f"{kind} {name}"
        if kind == "cut":
            proxy.cut()
            return
        way = self._rng.choice(["to_server", "to_client"])
        setattr(proxy, way, WEATHERS[kind])
        try:
            await asyncio.sleep(self._rng.uniform(*LINK_S))
        finally:
            proxy.to_server = proxy.to_client = FAIR

    def open_sockets(self, connections: int) -> int:
        """Connections through the proxies beyond those there should be."""
        posts = self._station.posts.values()
        num_prefill = sum(post.role is Role.PREFILL for post in posts)

        def fetchers(post: Post) -> int:
            """Other workers that may fetch blocks from it: of decode workers only prefill workers, as of a donor."""
            return len(posts) - 1 if post.role is Role.PREFILL else num_prefill

        def beyond(proxy: FaultProxy, allowed: int) -> int:
            return max(0, proxy.num_open - allowed)

        return sum(
            beyond(p.control, self._cluster.num_gateways) + beyond(p.kv, fetchers(p) * connections) for p in posts
        )
