"""Fakes that more than one test package uses: workers on real sockets whose answers can be computed by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from engine_core.block_hash import block_hashes
from engine_core.messages import (
    Cancel,
    Decode,
    Donate,
    Failed,
    Load,
    PeerAddress,
    Prefill,
    SnapshotRequest,
    TokenChunk,
    Tokens,
    WorkerInfo,
)
from engine_core.prefix_cache import BlockStored
from engine_core.types import FinishReason, Numerics, Request, Role, Tier, TokenLogprobs
from kv_transfer.block_publisher import BlockPublisher
from kv_transfer.control import ControlServer, GatewayLink
from router.fleet_view import AutoscaleView, FleetView, MemberView, ScaleChange, ScaleDecision

ANSWER = (
    "The quick brown fox jumps over the lazy dog. Zwölf Boxkämpfer jagen Viktor 🦊 über den großen Sylter Deich! " * 12
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE, a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([ANSWER.replace("🦊", "").replace("ä", "")] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def make_model_dir(directory: Path) -> Path:
    """What a gateway needs of a checkpoint."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(make_tokenizer().to_str(), encoding="utf-8")
    settings = {"chat_template": CHAT_TEMPLATE, "eos_token": SPECIAL[0]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def fake_token(answer: list[int], request: Request, position: int) -> int:
    """The token at a position: greedy streams say the answer, sampled ones begin `seed` tokens later, around."""
    offset = 0 if request.sampling.temperature == 0 else request.sampling.seed
    return answer[(offset + position) % len(answer)]


class FakeWorker:
    """A worker behind a real ControlServer that generates one token per request and step.

    Attributes:
        step_s: time per step; a prefill worker answers after one.
        fail: answer the next so many requests with Failed.
        die_at: hang up when a request reaches this position.
        received: every message, in order.
        active: requests being worked on.
    """

    def __init__(
        self,
        role: Role,
        worker_id: str,
        answer: list[int],
        *,
        incarnation: int = 1,
        step_s: float = 0.001,
        block_namespace: str = "",
    ):
        self.role = role
        self.answer = answer
        self.step_s = step_s
        self.fail = 0
        self.fail_code, self.fail_retryable = "no_free_pages", True
        self.die_at: int | None = None
        self.silent = False
        self.num_cached = 0
        self.load = Load(0, 0, 0, 100, False, 0)
        self.received: list[Prefill | Decode | Donate | Cancel] = []
        self.active: dict[str, tuple[GatewayLink, Request, int]] = {}
        self.info = WorkerInfo(
            worker_id=worker_id,
            incarnation=incarnation,
            role=role,
            address=PeerAddress("127.0.0.1", 0, 1 if role is Role.PREFILL else 2),
            fingerprint="fp",
            numerics=Numerics.FAST,
            num_slots=8,
            num_pages=100,
            page_size=16,
            max_model_len=512,
            block_namespace=block_namespace,
        )
        self.publisher = BlockPublisher(worker_id, incarnation)
        self.blocks: list[bytes] = []
        self._server = ControlServer(None, self)
        self._steps: asyncio.Task[None] | None = None

    async def start(self) -> FakeWorker:
        self.info = await self._server.start("127.0.0.1", self.info)
        self._server.broadcast(self.load)
        self._steps = asyncio.create_task(self._run())
        return self

    async def stop(self) -> None:
        if self._steps is not None:
            self._steps.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._steps
        await self._server.close()

    def beat(self, load: Load) -> None:
        self.load = load
        self._server.broadcast(load)

    def publish(self, tokens: list[int], salt: bytes) -> None:
        """Say that the blocks of a prompt are cached here."""
        stored = block_hashes(tokens, self.info.page_size, salt, bytes.fromhex(self.info.block_namespace))
        self.blocks += stored
        message = self.publisher.publish(Tier.DEVICE, [BlockStored(block_hash, None) for block_hash in stored])
        for link in self._server.links:
            link.send(message)

    @property
    def cancelled(self) -> list[str]:
        return [message.request_id for message in self.received if isinstance(message, Cancel)]

    def requests(self) -> list[Request]:
        return [message.request for message in self.received if isinstance(message, (Prefill, Decode))]

    # GatewayEvents

    def on_request(self, link: GatewayLink, message: Prefill | Decode | Donate | Cancel | SnapshotRequest) -> None:
        if isinstance(message, SnapshotRequest):
            for part in self.publisher.snapshot(message.number, {Tier.DEVICE: self.blocks}):
                link.send(part)
            return
        self.received.append(message)
        if isinstance(message, Donate):
            return
        if isinstance(message, Cancel):
            self.active.pop(message.request_id, None)
            return
        request = message.request
        if self.fail:
            self.fail -= 1
            link.send(Failed(request.request_id, request.epoch, self.fail_code, "made to fail", self.fail_retryable))
            return
        start = len(request.token_ids) - request.num_prompt_tokens
        position = start + (isinstance(message, Decode) and message.prefill is not None)
        self.active[request.request_id] = (link, request, position)

    def on_gateway_lost(self, link: GatewayLink) -> None:
        self.active = {key: value for key, value in self.active.items() if value[0] is not link}

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        told_at = loop.time()
        while True:
            await asyncio.sleep(self.step_s)
            if not self.silent:
                self._step()
                if loop.time() - told_at > 0.25:
                    told_at = loop.time()
                    self.beat(self.load)

    def _step(self) -> None:
        frames: dict[GatewayLink, list[TokenChunk]] = {}
        for request_id, (link, request, position) in list(self.active.items()):
            if position == self.die_at:
                self.die_at = None
                for channel in list(self._server._channels):
                    channel.abort(ConnectionError("made to die"))
                self._server._server.close()
                return
            chunk = self._chunk(request, position)
            frames.setdefault(link, []).append(chunk)
            if chunk.finish_reason or self.role is Role.PREFILL:
                del self.active[request_id]
            else:
                self.active[request_id] = (link, request, position + 1)
        for link, chunks in frames.items():
            link.send(Tokens(chunks))

    def _chunk(self, request: Request, position: int) -> TokenChunk:
        sampling = request.sampling
        if position >= sampling.max_tokens:  # a prefill worker's token was the last
            return TokenChunk(request.request_id, request.epoch, position, [], FinishReason.LENGTH)
        token = fake_token(self.answer, request, position)
        if token in sampling.stop_token_ids and not sampling.ignore_eos:
            return TokenChunk(request.request_id, request.epoch, position, [], FinishReason.STOP)
        logprobs = []
        if sampling.logprobs is not None:
            top = tuple((token + rank) % len(self.answer) for rank in range(sampling.logprobs))
            logprobs = [TokenLogprobs(-0.5, top, tuple(-0.5 - rank for rank in range(sampling.logprobs)))]
        finish = FinishReason.LENGTH if position + 1 == sampling.max_tokens else None
        return TokenChunk(
            request.request_id,
            request.epoch,
            position,
            [token],
            finish,
            logprobs,
            self.num_cached,
            [TokenLogprobs(-float(token)) for token in request.token_ids[1:]] if sampling.prompt_logprobs else [],
        )


def fleet_view(infos: Sequence[WorkerInfo]) -> FleetView:
    """What a fleet of these workers would say, with an autoscaler that has done something."""
    members = tuple(MemberView(info.worker_id, str(info.role), 1, "ready", "", 1) for info in infos)
    reasons = ("decode: the floor is 2, there are 1",)
    decision = ScaleDecision(
        1.7e9, True, {"prefill": 1, "decode": 1}, {"prefill": 1, "decode": 2}, "1P1D -> 1P2D: start 1 decode", reasons
    )
    changes = (ScaleChange("decode", "up", "forecast", 1),)
    autoscale = AutoscaleView("act", "", {"prefill": 1, "decode": 2}, changes, (decision,))
    return FleetView({"prefill": 1, "decode": 2}, members, (f"autoscale: {decision.text}",), autoscale)
