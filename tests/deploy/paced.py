"""Workers behind real sockets that take the time they are told to, for tests of scaling.

`baton serve` with them and a real gateway: python -m tests.deploy.paced PORT DIRECTORY RAY_ADDRESS [serve flags].
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from deploy import launch
from engine_core.config import EngineConfig
from engine_core.messages import (
    Cancel,
    Decode,
    Load,
    Measured,
    PeerAddress,
    Prefill,
    SnapshotRequest,
    StepSums,
    TokenChunk,
    Tokens,
    WorkerInfo,
)
from engine_core.types import FinishReason, Numerics, Request, Role
from kv_transfer.control import ControlServer, GatewayLink

PREFILL_S = 0.25  # per prompt, one after the other: four a second
STEP_S = 0.01  # per decode step
BEAT_S = 0.25
PAGES = 1000
FULL = "full"  # while the model directory has this file, decode workers say that they have hardly any pages left


class PacedWorker:
    """Takes the constructor of the real workers."""

    role: Role

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        worker_id: str,
        incarnation: int,
        listen: PeerAddress,
        secret: bytes | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._full = model_dir / FULL
        self._listen = listen
        self._info = WorkerInfo(
            worker_id=worker_id,
            incarnation=incarnation,
            role=self.role,
            address=PeerAddress(listen.host, 0, 1),
            fingerprint="paced",
            numerics=Numerics.FAST,
            num_slots=64,
            num_pages=PAGES,
            page_size=16,
            max_model_len=512,
            chunk_tokens=512,
        )
        self.healthy = True
        self._draining = False
        self._server = ControlServer(secret, self)
        self._tasks: list[asyncio.Task[None]] = []
        self._work: deque[tuple[GatewayLink, Request]] = deque()
        self._steps: list[StepSums] = []

    async def start(self) -> WorkerInfo:
        self._info = await self._server.start(self._listen.host, self._info)
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._beat())]
        return self._info

    async def drain(self, timeout_s: float) -> None:
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._work:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._server.close()

    def load(self) -> Load:
        count = len(self._work)
        free = 10 if self.role is Role.DECODE and self._full.exists() else PAGES
        queued = sum(len(request.token_ids) for _, request in self._work) if self.role is Role.PREFILL else 0
        return Load(min(count, 1), max(0, count - 1), queued, free, self._draining, 0)

    def on_request(self, link: GatewayLink, message: Prefill | Decode | Cancel | SnapshotRequest) -> None:
        if isinstance(message, (Prefill, Decode)):
            self._work.append((link, message.request))
        elif isinstance(message, Cancel):
            self._work = deque(item for item in self._work if item[1].request_id != message.request_id)

    def on_gateway_lost(self, link: GatewayLink) -> None:
        self._work = deque(item for item in self._work if item[0] is not link)

    async def _beat(self) -> None:
        while True:
            self._server.broadcast(self.load())
            if self._steps:
                steps, self._steps = self._steps, []
                for link in self._server.links:
                    link.send(Measured(steps))
            await asyncio.sleep(BEAT_S)

    async def _run(self) -> None:
        raise NotImplementedError


class PacedPrefillWorker(PacedWorker):
    role = Role.PREFILL

    async def _run(self) -> None:
        while True:
            if not self._work:
                await asyncio.sleep(0.005)
                continue
            link, request = self._work[0]
            await asyncio.sleep(PREFILL_S)
            count = len(request.token_ids)
            self._steps.append(StepSums(1, count, count * count // 2, 0, 0, 0, PREFILL_S))
            if self._work and self._work[0][1] is request:
                self._work.popleft()
                link.send(Tokens([TokenChunk(request.request_id, request.epoch, 0, [5])]))


class PacedDecodeWorker(PacedWorker):
    role = Role.DECODE

    async def _run(self) -> None:
        """Every request's other tokens, one per step; what comes before its first token waits in the gateway."""
        done: dict[str, int] = {}
        while True:
            await asyncio.sleep(STEP_S)
            if self._work:
                self._steps.append(StepSums(0, 0, 0, 1, len(self._work), 20 * len(self._work), STEP_S))
            for link, request in list(self._work):
                position = done.get(request.request_id, 1)
                done[request.request_id] = position + 1
                finish = FinishReason.LENGTH if position + 1 >= request.sampling.max_tokens else None
                link.send(Tokens([TokenChunk(request.request_id, request.epoch, position, [6], finish)]))
                if finish:
                    self._work.remove((link, request))
                    del done[request.request_id]


def main(port: str, directory: str, ray_address: str, *flags: str) -> int:
    home = Path(directory)
    config = launch.read_config(["--port", port, "--fleet.pool_resources", "true", *flags], None)
    here = "tests.deploy.paced"
    return launch.launch(
        config,
        model_dir=home,
        run_files=launch.default_run_files(),
        worker_classes={Role.PREFILL: f"{here}:PacedPrefillWorker", Role.DECODE: f"{here}:PacedDecodeWorker"},
        gateway_class=launch.GATEWAY_CLASS,
        timeline=True,
        secret=None,
        ray_address=ray_address,
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
