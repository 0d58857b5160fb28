"""A gateway that only tells which workers it knows. GET /readiness, GET /workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from engine_core.errors import ConfigError
from engine_core.messages import WorkerInfo
from engine_core.types import Role
from router.config import GatewayConfig
from router.fleet_view import FleetView
from router.load_meter import LoadMeter, LoadTotals


class FakeGateway:
    def __init__(self, config: GatewayConfig, model_dir: Path, secret: bytes | None) -> None:
        if (model_dir / "gateway_refuses").exists():
            raise ConfigError("the chat template is broken")
        self._host, self._port = config.host, config.port
        self._streams = model_dir / "streams"
        self._workers: Sequence[WorkerInfo] = ()
        self._server: asyncio.Server | None = None

    async def start(self, workers: Sequence[WorkerInfo] = ()) -> None:
        self._workers = workers
        self._server = await asyncio.start_server(self._answer, self._host, self._port, reuse_port=True)

    def follow(self, workers: Sequence[WorkerInfo]) -> None:
        self._workers = workers

    def describe_fleet(self, fleet: FleetView) -> None: ...

    @property
    def num_streams(self) -> int:
        return int(self._streams.read_text()) if self._streams.exists() else 0

    def measure(self) -> LoadTotals:
        return LoadMeter(1.0, 1.0).read(0.0, (), 0, ())

    def check_health(self) -> None:
        assert self._server is not None and self._server.is_serving()

    async def drain(self, timeout_s: float) -> None:
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        ready = any(worker.role is Role.DECODE for worker in self._workers)
        status = "200 OK" if ready or b"/readiness" not in request else "503 Service Unavailable"
        body = json.dumps(sorted([worker.worker_id, worker.incarnation] for worker in self._workers)).encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()
