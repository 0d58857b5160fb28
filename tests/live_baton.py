"""A gateway in front of real workers of a tiny model, on a thread of this process: what real tools are pointed at."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx

from engine_core.config import ModelConfig
from engine_core.types import Numerics
from router.config import GatewayConfig
from router.server import Gateway
from tests.baton_process import free_port, until
from tests.e2e.model import make_checkpoint
from tests.fakes import fleet_view
from tests.mini_cluster import MiniCluster, tiny_config

MODEL = "tiny"
LOCAL_TOKENS = 4  # shorter prompts are read by the decode worker itself


class LiveBaton:
    """Prefill worker `p`, decode workers `d` and `c`, one gateway that can be restarted on its port.

    Args:
        directory: for the checkpoint.
        settings: of the gateway.
    """

    def __init__(self, directory: Path, **settings: object) -> None:
        self._model_dir = make_checkpoint(directory)
        self._compile_cache = directory.parent / "xla"
        self._settings = settings
        self._asked = 0
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        keys: Any = settings.get("api_keys", ())
        self.headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="live baton", daemon=True)
        self._thread.start()
        self.cluster: MiniCluster
        self.gateway: Gateway

    def start(self) -> LiveBaton:
        config = dataclasses.replace(
            tiny_config(Numerics.FAST),
            model=ModelConfig(path=str(self._model_dir)),
            compile_cache=str(self._compile_cache),
        )
        self.cluster = self.do(MiniCluster.start(config))
        self.start_gateway()
        return self

    def start_gateway(self) -> None:
        self.do(self._start_gateway())
        until(lambda: httpx.get(f"{self.url}/readiness").status_code == 200)

    def stop_gateway(self) -> None:
        self.do(self.gateway.stop())

    def stop(self) -> None:
        self.stop_gateway()
        self.do(self.cluster.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run it on the cluster's loop."""
        done: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(180)

    def ask(self, count: int) -> None:
        """Some traffic: prompts of many lengths, half of them seen before; the others move KV between workers."""
        with httpx.Client(base_url=self.url, headers=self.headers, timeout=60) as client:
            for _ in range(count):
                self._asked += 1
                first = self._asked // 2 * 13
                prompt = [5 + (first + place) % 140 for place in range(2 + 9 * (self._asked // 2 % 6))]
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
                reply = client.post("/v1/completions", json=body)
                assert reply.status_code == 200, reply.text

    async def _start_gateway(self) -> None:
        config = GatewayConfig(
            model_name=MODEL,
            port=self.port,
            local_prefill_tokens=LOCAL_TOKENS,
            **self._settings,  # type: ignore[arg-type]
        )
        self.gateway = Gateway(config, self._model_dir)
        await self.gateway.start()
        infos = [worker.info() for worker in self.cluster.workers]
        self.gateway.follow(infos)
        self.gateway.describe_fleet(fleet_view(infos))
