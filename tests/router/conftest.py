"""A gateway on a real port in front of fake workers on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from engine_core.compiled_library import COMPILERS, find_compiler
from engine_core.types import Role
from router.compiled.library import Compiled, open_compiled
from router.config import GatewayConfig
from router.server import Gateway
from tests.fakes import ANSWER, FakeWorker, make_model_dir, make_tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def answer_ids() -> list[int]:
    return make_tokenizer().encode(ANSWER).ids


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if find_compiler(COMPILERS) is None:
        pytest.skip("no C++ compiler")
    library = open_compiled(tmp_path_factory.mktemp("compiled"), COMPILERS)
    assert library is not None
    return library


@dataclass
class Cluster:
    """A running gateway and its workers."""

    gateway: Gateway
    prefill: list[FakeWorker]
    decode: list[FakeWorker]
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient

    @property
    def service(self):
        return self.gateway.service

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def follow_all(self) -> None:
        self.gateway.follow([worker.info for worker in self.prefill + self.decode])


@asynccontextmanager
async def run_cluster(
    model_dir: Path,
    answer_ids: list[int],
    *,
    prefill: int = 1,
    decode: int = 1,
    block_namespace: str = "",
    **settings: object,
) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        workers: dict[Role, list[FakeWorker]] = {Role.PREFILL: [], Role.DECODE: []}
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for index in range(count):
                worker = FakeWorker(role, f"{role}-{index}", answer_ids, block_namespace=block_namespace)
                await worker.start()
                stack.push_async_callback(worker.stop)
                workers[role].append(worker)
        defaults = {"port": 0, "worker_wait_s": 0.5, "local_prefill_tokens": 0}
        config = GatewayConfig(**{**defaults, **settings})  # type: ignore[arg-type]
        gateway = Gateway(config, model_dir)
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        base = f"http://127.0.0.1:{gateway.port}"
        key = config.api_keys[0] if config.api_keys else "none"
        client = await stack.enter_async_context(openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=base, timeout=60))
        cluster = Cluster(gateway, workers[Role.PREFILL], workers[Role.DECODE], client, http)
        cluster.follow_all()
        await cluster.until(lambda: len(gateway.service.registry.decode) == decode)
        await cluster.until(lambda: len(gateway.service.registry.prefill) == prefill)
        yield cluster


@pytest.fixture
async def cluster(model_dir: Path, answer_ids: list[int]) -> AsyncIterator[Cluster]:
    async with run_cluster(model_dir, answer_ids) as running:
        yield running
        await running.until(lambda: not running.service._streams)
        for worker in running.service.registry.workers.values():
            reserved = worker.candidate.reserved_requests, worker.candidate.reserved_tokens
            assert (*reserved, len(worker.streams)) == (0, 0, 0)
