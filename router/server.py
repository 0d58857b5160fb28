"""The gateway process: a socket, uvicorn, the service; started and stopped inside a running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import hashlib
import importlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn

from engine_core.compiled_library import COMPILERS
from engine_core.errors import ConfigError
from engine_core.messages import WorkerInfo
from router.app import build_app, build_endpoints
from router.clients import MakeClient, connect_with
from router.compiled.library import Compiled, open_compiled
from router.config import GatewayConfig
from router.fleet_view import FleetView
from router.http_protocol import HttpProtocol, close_idle
from router.load_meter import LoadTotals
from router.outbox import Outbox
from router.service import Service
from router.tokenizer import TextCodec

logger = logging.getLogger(__name__)

BACKLOG = 2048
TOKENIZER_THREADS = 2
START_POLL_S = 0.01
CONNECT_S = 2.0
STOP_S = 0.5
LAST_WORD_S = 1.0  # for those whose requests end with an error to hear so
TICKS_PER_S = 10  # of uvicorn's
GC_THRESHOLD = 20_000  # a request leaves hardly any cycles


class Gateway:
    """One gateway. Use uvloop for speed: the caller's event loop is taken as it is.

    Args:
        model_dir: holds tokenizer.json, and the chat template if there is one.
        secret: shared with the workers; None on loopback only.
        make_client: how to reach workers; None: over TCP.
    """

    def __init__(
        self,
        config: GatewayConfig,
        model_dir: Path,
        secret: bytes | None = None,
        make_client: MakeClient | None = None,
    ) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")
        codec = TextCodec.load(model_dir, config.inline_tokenize_chars, self._threads)
        self._make_client = make_client or connect_with(secret, f"gateway-{socket.gethostname()}-{os.getpid()}")
        self._codec = codec
        self._salt = block_salt(config, secret)
        self._socket: socket.socket | None = None
        self._server: _Server
        self._serving: asyncio.Task[None]
        self.service: Service
        self.port = config.port

    async def start(self, workers: Sequence[WorkerInfo] = ()) -> None:
        """Listen; returns when requests are accepted.

        Args:
            workers: those that serve already. They are connected to first: a port that is shared with other gateways
                gets its part of the clients at once.

        Raises:
            ConfigError: the address cannot be had.
        """
        compiled = await asyncio.to_thread(_compiled, self._config)
        if compiled is not None:
            await asyncio.to_thread(self._codec.compile, compiled.words)
        self.service = Service(self._config, self._codec, self._make_client, self._salt, compiled)
        if self._config.trace_endpoint:
            tracing = importlib.import_module("router.tracing").Tracing
            self.service.tracing = tracing.to(self._config.trace_endpoint, self._config.model_name)
        self.service.start()
        self.service.follow(workers)
        await self.service.registry.until_connected(CONNECT_S)
        self._socket = _listen(self._config.host, self._config.port)
        self.port = self._socket.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._server = _Server(
            uvicorn.Config(
                build_app(self.service),
                http=functools.partial(HttpProtocol, build_endpoints(self.service), Outbox(loop)),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=self._config.keep_alive_s,  # see _Server.on_tick
            )
        )
        self._serving = loop.create_task(self._server.serve([self._socket]))
        while not self._server.started and not self._serving.done():  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(START_POLL_S)
        gc.collect()
        gc.freeze()  # what lives as long as the process need not be traversed again
        gc.set_threshold(GC_THRESHOLD)
        logger.info("listening on %s:%d", self._config.host, self.port)

    def follow(self, workers: Sequence[WorkerInfo]) -> None:
        """These workers serve, and no others."""
        self.service.follow(workers)

    def describe_fleet(self, fleet: FleetView) -> None:
        """What the dashboard shows of the fleet."""
        self.service.fleet = self.service.metrics.fleet = fleet

    @property
    def num_streams(self) -> int:
        """Choices in progress."""
        return self.service.metrics.running_streams

    def measure(self) -> LoadTotals:
        """What it tells the autoscaler."""
        return self.service.measure()

    def check_health(self) -> None:
        """Raises if the server has ended."""
        if self._serving.done():
            self._serving.result()
            raise RuntimeError("the HTTP server has stopped")

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, finish the running ones within the time, tell the others, close."""
        self.service.draining = True
        shutdown_s = timeout_s + LAST_WORD_S
        self._server.config.timeout_graceful_shutdown = shutdown_s  # type: ignore[assignment]  # any number will do
        self._server.should_exit = True
        ending = asyncio.get_running_loop().call_later(timeout_s, self.service.end_all)
        await self._serving
        ending.cancel()
        await self.service.close()
        if self.service.tracing is not None:
            await asyncio.to_thread(self.service.tracing.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def stop(self) -> None:
        """Close now."""
        await self.drain(STOP_S)


def block_salt(config: GatewayConfig, secret: bytes | None) -> bytes:
    """Keys the block hashes of a cluster: nobody outside can make two prompts share a block."""
    salt = hashlib.blake2b(config.block_salt.encode(), digest_size=16, person=b"baton.salt")
    salt.update(secret or b"")
    return salt.digest()


def _compiled(config: GatewayConfig) -> Compiled | None:
    """What is compiled of the router; it takes a second or two once per machine, before anything is served."""
    if not config.compile_cache:
        return None
    return open_compiled(Path(config.compile_cache).expanduser() / "router", COMPILERS)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to whoever owns the process.

    Idle connections are closed here, not by a timer each.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn: called ten times a second."""
        if counter % TICKS_PER_S == 0:
            since = asyncio.get_running_loop().time() - self.config.timeout_keep_alive
            close_idle(self.server_state.connections, since)
        return await super().on_tick(counter)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket that other gateways of this machine may share."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted connections inherit it
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    return listener
