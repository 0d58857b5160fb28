"""Where workers of a chaos run announce themselves: they get proxies to be reached through, and say what they hold."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.chaos.frames import control_frames, kv_frames
from benchmarks.chaos.proxy import FaultProxy
from engine_core.messages import PeerAddress, WorkerInfo
from engine_core.types import Role

FILE = "chaos.json"  # in the model's directory: where the station listens
ANSWER_S = 5.0


class Post:
    """One life of a worker at the station.

    Attributes:
        role: of the worker.
        control, kv: proxies that gateways, and workers that fetch blocks, reach it through.
    """

    def __init__(
        self,
        worker_id: str,
        role: Role,
        control: FaultProxy,
        kv: FaultProxy,
        streams: tuple[Any, asyncio.StreamWriter],
    ) -> None:
        self.worker_id = worker_id
        self.role = role
        self.control = control
        self.kv = kv
        self._reader, self._writer = streams
        self._asking = asyncio.Lock()

    async def ask(self) -> dict[str, int]:
        """What it holds now. Raises OSError or TimeoutError where it is gone or frozen."""
        async with self._asking, asyncio.timeout(ANSWER_S):
            self._writer.write(b"?\n")
            line = await self._reader.readline()
            if not line:
                raise ConnectionResetError(f"{self.worker_id} is gone")
            counts: dict[str, int] = json.loads(line)
            return counts


class Station:
    """The driver's side.

    Attributes:
        posts: of the latest life of each worker.
    """

    def __init__(self, rng: random.Random) -> None:
        self.posts: dict[str, Post] = {}
        self._rng = rng
        self._server: asyncio.Server
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, model_dir: Path) -> None:
        """Listen, and say where in the model's directory."""
        self._server = await asyncio.start_server(self._welcome, "127.0.0.1", 0)
        (model_dir / FILE).write_text(json.dumps(self._server.sockets[0].getsockname()[1]))

    async def close(self) -> None:
        """Hang up on all."""
        self._server.close()
        for writer in list(self._writers):
            writer.close()
        for post in self.posts.values():
            await self._retire(post)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(await reader.readline())
            control = FaultProxy("127.0.0.1", told["port"], self._rng, control_frames)
            kv = FaultProxy("127.0.0.1", told["kv_port"], self._rng, kv_frames)
            answer = {"port": await control.start(), "kv_port": await kv.start()}
            former = self.posts.get(told["worker_id"])
            self.posts[told["worker_id"]] = Post(told["worker_id"], Role(told["role"]), control, kv, (reader, writer))
            writer.write(json.dumps(answer).encode() + b"\n")
            if former is not None:
                await self._retire(former)

    @staticmethod
    async def _retire(post: Post) -> None:
        for proxy in (post.control, post.kv):
            await proxy.close()


async def register(model_dir: Path, info: WorkerInfo, counts: Callable[[], dict[str, int]]) -> WorkerInfo:
    """A worker's side: announce it; returns `info` with the proxies' addresses. Answers questions from then on."""
    port = json.loads((model_dir / FILE).read_text())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    address = info.address
    told = {"worker_id": info.worker_id, "role": info.role, "port": address.port, "kv_port": address.kv_port}
    writer.write(json.dumps(told).encode() + b"\n")
    given = json.loads(await reader.readline())

    async def answer() -> None:
        with contextlib.suppress(OSError):
            while await reader.readline():
                writer.write(json.dumps(counts()).encode() + b"\n")

    _ANSWERING.add(asyncio.get_running_loop().create_task(answer()))
    return msgspec.structs.replace(info, address=PeerAddress(address.host, given["port"], given["kv_port"]))


_ANSWERING: set[asyncio.Task[None]] = set()
"""One per process, kept alive."""
