"""The processes of `baton bench gateway`: python -m benchmarks.gateway_parts ROLE JSON.

Each prints its port (or ports) as one line of JSON and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from engine_core.config import EngineConfig
from engine_core.messages import (
    Cancel,
    Decode,
    Donate,
    Load,
    PeerAddress,
    Prefill,
    SnapshotRequest,
    TokenChunk,
    Tokens,
    WorkerInfo,
)
from engine_core.types import FinishReason, Numerics, Role
from engine_core.types import Request as EngineRequest
from kv_transfer.control import ControlServer, GatewayLink
from router.config import GatewayConfig
from router.server import Gateway

MAX_PENDING_BYTES = 64 << 10  # a gateway that is slower gets its next step later


class FakeEngine:
    """A worker without a model: one token per request and step, all requests of a step in one frame."""

    def __init__(self, role: Role, answer: list[int], decode: FakeEngine | None) -> None:
        self._role = role
        self._answer = answer
        self._decode = decode  # of a prefill engine: who gets the KV cache
        self._handed_over: set[str] = set()
        self._waiting: dict[str, tuple[GatewayLink, EngineRequest]] = {}
        self._active: dict[str, tuple[GatewayLink, EngineRequest, int]] = {}
        self._stepping = False
        self._server = ControlServer(None, self)

    async def start(self) -> WorkerInfo:
        """Listen on a free port."""
        info = WorkerInfo(
            f"bench-{self._role}",
            1,
            self._role,
            PeerAddress("127.0.0.1", 0, 1),
            "bench",
            Numerics.FAST,
            64,
            999,
            16,
            4096,
        )
        info = await self._server.start("127.0.0.1", info)
        self._server.broadcast(Load(0, 0, 0, 999, False, 0))
        return info

    def on_request(self, link: GatewayLink, message: Prefill | Decode | Donate | Cancel | SnapshotRequest) -> None:
        """See GatewayEvents."""
        if isinstance(message, (SnapshotRequest, Donate)):
            return
        if isinstance(message, Cancel):
            self._active.pop(message.request_id, None)
            return
        request = message.request
        if self._role is Role.PREFILL:
            self._begin(link, request, 0)
        elif request.request_id in self._handed_over:
            self._handed_over.remove(request.request_id)
            self._begin(link, request, 1)
        else:
            self._waiting[request.request_id] = (link, request)

    def take_over(self, request_id: str) -> None:
        """The prompt has been read: what a real decode worker learns with the last KV block."""
        if request_id in self._waiting:
            self._begin(*self._waiting.pop(request_id), 1)
        else:
            self._handed_over.add(request_id)

    def _begin(self, link: GatewayLink, request: EngineRequest, position: int) -> None:
        self._active[request.request_id] = (link, request, position)
        if not self._stepping:
            self._stepping = True
            asyncio.get_running_loop().call_soon(self._step)

    def on_gateway_lost(self, link: GatewayLink) -> None:
        """See GatewayEvents."""
        self._active.clear()

    def beat(self) -> None:
        """Say that we live."""
        self._server.broadcast(Load(len(self._active), 0, 0, 999, False, 0))

    def _step(self) -> None:
        loop = asyncio.get_running_loop()
        if any(link.pending_bytes > MAX_PENDING_BYTES for link in self._server.links):
            loop.call_later(0.0005, self._step)
            return
        frames: dict[GatewayLink, list[TokenChunk]] = {}
        for request_id, (link, request, position) in list(self._active.items()):
            last = position + 1 >= request.sampling.max_tokens
            finish = FinishReason.LENGTH if last else None
            token = self._answer[position % len(self._answer)]
            frames.setdefault(link, []).append(TokenChunk(request_id, request.epoch, position, [token], finish))
            if last or self._decode is not None:
                del self._active[request_id]
                if self._decode is not None:
                    self._decode.take_over(request_id)
            else:
                self._active[request_id] = (link, request, position + 1)
        for link, chunks in frames.items():
            link.send(Tokens(chunks))
        self._stepping = bool(self._active)
        if self._stepping:
            loop.call_soon(self._step)


def bare_app(whole: bytes, events: list[bytes], framework: bool) -> object:
    """The same bytes without any work: FastAPI as its documentation has it, or nothing but ASGI."""
    if not framework:
        return _BareAsgi(whole, events)
    app = FastAPI()

    async def stream() -> AsyncIterator[bytes]:
        for event in events:
            yield event

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        if msgspec.json.decode(await request.body()).get("stream"):
            return StreamingResponse(stream(), media_type="text/event-stream")
        return Response(whole, media_type="application/json")

    return app


class _BareAsgi:
    def __init__(self, whole: bytes, events: list[bytes]) -> None:
        self._whole = whole
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        if not msgspec.json.decode(body).get("stream"):
            length = (b"content-length", b"%d" % len(self._whole))
            headers = [(b"content-type", b"application/json"), length]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": self._whole})
            return
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.sleep(0)  # as any source of events would: one write each
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def run_worker(answer: list[int]) -> None:
    """Both roles in one process."""
    decode = FakeEngine(Role.DECODE, answer, None)
    engines = [FakeEngine(Role.PREFILL, answer, decode), decode]
    infos = [await engine.start() for engine in engines]
    _say(msgspec.to_builtins(infos))
    until_eof = asyncio.create_task(_until_eof())
    while not until_eof.done():
        await asyncio.wait([until_eof], timeout=0.5)
        for engine in engines:
            engine.beat()


async def run_gateway(workers: list[dict[str, object]], model_dir: str) -> None:
    """The real one."""
    cache = EngineConfig().compile_cache
    config = GatewayConfig(model_name="bench", port=0, local_prefill_tokens=0, compile_cache=cache)
    gateway = Gateway(config, Path(model_dir))
    await gateway.start()
    gateway.follow(msgspec.convert(workers, list[WorkerInfo]))
    while not gateway.service.registry.ready:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    _say(gateway.port)
    await _until_eof()
    await gateway.stop()


async def run_bare(whole: str, events: list[str], framework: bool) -> None:
    """The yardstick, served exactly as the gateway is."""
    app = bare_app(whole.encode(), [event.encode() for event in events], framework)
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        port=0,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    _say(server.servers[0].sockets[0].getsockname()[1])
    await _until_eof()
    server.should_exit = True
    await serving


async def _until_eof() -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


def main(role: str, arguments: str) -> None:
    """Run one process."""
    run = {"worker": run_worker, "gateway": run_gateway, "bare": run_bare}[role]
    uvloop.run(run(**json.loads(arguments)))  # type: ignore[operator]


if __name__ == "__main__":
    main(*sys.argv[1:])
