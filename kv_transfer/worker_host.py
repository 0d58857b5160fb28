"""What workers of both roles are made of beside their scheduler: gateway links, the engine thread, beats, drain.

Threads: gateways and timers live on the event loop; the scheduler lives on the engine thread. `WorkerHost` is the only
place where the two meet: requests and cancels are posted to the engine thread, tokens and failures are called back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

from engine_core.engine_thread import EngineThread
from engine_core.errors import (
    BatonError,
    CapacityError,
    DeadlineExceeded,
    ProtocolError,
    RequestCancelled,
    RequestError,
    RequestTooLong,
    WorkerDied,
)
from engine_core.messages import (
    BlockEvents,
    BlockSnapshot,
    Cancel,
    Decode,
    Donate,
    Failed,
    Load,
    Measured,
    Prefill,
    SnapshotRequest,
    StepSums,
    TokenChunk,
    Tokens,
    WorkerInfo,
)
from engine_core.prefix_cache import BlockEvent
from engine_core.types import Request, Tier
from engine_core.worker_stats import StatsRecorder
from kv_transfer.block_publisher import BlockPublisher
from kv_transfer.control import ControlServer, GatewayLink
from kv_transfer.donor import Donor

logger = logging.getLogger(__name__)

Key = tuple[str, int]

BEAT_S = 0.25
MAX_QUIET = 1  # beats that may be left out in a row
STOP_TIMEOUT_S = 10.0
PUBLISH_S = 0.02  # block events of a busy worker are sent this often
STATS_S = 1.0


class RoleScheduler(Protocol):
    """A scheduler as its host drives it; all on the engine thread."""

    @property
    def num_running(self) -> int:
        """Sequences at work."""

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for room."""

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens still to be computed."""

    @property
    def num_preemptions(self) -> int:
        """Times that a running sequence gave its pages to others."""

    def drain_samples(self) -> list[StepSums]:
        """How long steps took since the last call."""

    def cancel(self, key: Key) -> None:
        """Free everything a request holds."""

    def tick(self) -> bool:
        """One round; whether another should follow at once."""


class ServedReplica(Protocol):
    """What of `engine_core.replica.Replica` a host needs (that module imports jax, this package never does)."""

    @property
    def vocab_size(self) -> int:
        """Token ids beyond it are refused."""

    @property
    def max_model_len(self) -> int:
        """Longer sequences are refused."""

    @property
    def free_pages(self) -> int:
        """Pages that can be had, free or evictable."""

    @property
    def compiles_after_warmup(self) -> int:
        """Must stay 0."""

    def drain_block_events(self) -> Sequence[BlockEvent]:
        """How the prefix cache changed since the last call."""

    def block_hashes(self) -> list[bytes]:
        """What the prefix cache holds."""

    @property
    def stats(self) -> StatsRecorder:
        """What is counted for operators."""


class WorkerHost:
    """Runs a scheduler on behalf of gateways.

    Args:
        secret: shared with gateways; None binds to loopback only.
        scheduler: the role's.
        accept: takes a validated Prefill or Decode, on the engine thread.
        on_cancel: told, on the engine thread, of every request that is given up.
        replica: says what fits, and how it is doing.
        step_timeout_s: a tick of the scheduler that takes longer hangs.
    """

    def __init__(
        self,
        *,
        secret: bytes | None,
        scheduler: RoleScheduler,
        accept: Callable[[Prefill | Decode], None],
        on_cancel: Callable[[Key], None],
        replica: ServedReplica,
        step_timeout_s: float,
    ) -> None:
        self.draining = False
        self._scheduler = scheduler
        self._accept = accept
        self._on_cancel = on_cancel
        self._donor: Donor | None = None
        self._replica = replica
        self._server = ControlServer(secret, self)
        self._server.refused = replica.stats.refused
        self._engine_thread = EngineThread(self._tick, self._on_crash)
        self._owners: dict[Key, GatewayLink] = {}
        self._deadlines: dict[Key, asyncio.TimerHandle] = {}
        self._step_timeout_s = step_timeout_s
        self._failed = False
        self._rounds_seen, self._stalled_s = 0, 0.0
        self._stopping = False
        self._subscribers: set[GatewayLink] = set()
        self._published_at = 0.0
        self._measured_at = 0.0
        self._publisher: BlockPublisher
        self._at_rest = asyncio.Event()
        self._beats: asyncio.Task[None]
        self._loop: asyncio.AbstractEventLoop

    async def start(self, host: str, info: WorkerInfo, donor: Donor | None = None) -> WorkerInfo:
        """Start the engine thread, listen, begin to beat. Returns `info` with the real port.

        Args:
            donor: hands cached blocks over; None: this worker cannot, and is deaf to a `Donate`.
        """
        self._donor = donor
        self._loop = asyncio.get_running_loop()
        self._publisher = BlockPublisher(info.worker_id, info.incarnation)
        self._engine_thread.start()
        info = await self._server.start(host, info)
        self._beats = self._loop.create_task(self._beat())
        return info

    async def drain(self, timeout_s: float) -> None:
        """Take no new work and wait for what runs, at most `timeout_s`."""
        self.draining = True
        self._server.broadcast(self.load())
        if self._owners:
            self._at_rest.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._at_rest.wait(), timeout_s)

    async def stop(self) -> None:
        """Hang up and end the engine thread."""
        self._stopping = True
        self._beats.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._beats
        for handle in self._deadlines.values():
            handle.cancel()
        await self._server.close()
        await self._loop.run_in_executor(None, self._engine_thread.stop, STOP_TIMEOUT_S)

    @property
    def healthy(self) -> bool:
        """Whether the engine thread is alive and gets on."""
        return self._engine_thread.alive and not self._failed

    def load(self) -> Load:
        """What this worker is doing."""
        return Load(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            queued_tokens=self._scheduler.queued_tokens,
            free_pages=self._replica.free_pages,
            draining=self.draining,
            compiles_after_warmup=self._replica.compiles_after_warmup,
            preemptions=self._scheduler.num_preemptions,
        )

    # Called by the scheduler's side, on the engine thread.

    def emit(self, chunks: list[TokenChunk]) -> None:
        """Send a step's tokens to the gateways that asked for them."""
        self._call_back(self._send_tokens, chunks)

    def end(self, key: Key) -> None:
        """Nothing more follows for this request."""
        self._call_back(self._forget, key)

    def fail(self, key: Key, error: BatonError) -> None:
        """Tell the owner that the request is gone."""
        self._call_back(self._send_failure, key, error)

    # Called on the event loop.

    def post(self, command: Callable[[], None]) -> None:
        """Run `command` on the engine thread."""
        self._engine_thread.post(command)

    def give_up(self, key: Key) -> None:
        """Cancel a request everywhere in this worker."""
        self._forget(key)
        self.post(lambda: self._cancel(key))

    def on_request(self, link: GatewayLink, message: Prefill | Decode | Donate | Cancel | SnapshotRequest) -> None:
        """GatewayEvents: new work, a cancel, or a question."""
        if isinstance(message, SnapshotRequest):
            self.post(lambda: self._answer(link, message.number))
            return
        if isinstance(message, Cancel):
            self.give_up((message.request_id, message.epoch))
            return
        if isinstance(message, Donate):
            self._donate(message)
            return
        request = message.request
        key = (request.request_id, request.epoch)
        problem = self._problem(request)
        if problem is not None:
            link.send(_failure(key, problem))
            return
        if key in self._owners:
            return
        self._owners[key] = link
        self._deadlines[key] = self._loop.call_later(message.deadline_ms / 1000, self._expire, key)
        self.post(lambda: self._accept(message))

    def _donate(self, message: Donate) -> None:
        """Who fetches finds out by itself where nothing comes of it; a worker that drains still gives."""
        donor = self._donor
        if donor is not None and self._fault_of(message.request) is None:
            self.post(lambda: donor.add(message))

    def on_gateway_lost(self, link: GatewayLink) -> None:
        """GatewayEvents: nobody wants these any more."""
        self._subscribers.discard(link)
        for key in [key for key, owner in self._owners.items() if owner is link]:
            self.give_up(key)

    def _tick(self) -> bool:
        began_at = time.monotonic()
        busy = self._scheduler.tick()
        if self._donor is not None:
            busy = self._donor.tick(wait=not busy) or busy
        now = time.monotonic()
        if busy:
            self._replica.stats.busy_s += now - began_at
        if not busy or now - self._published_at >= PUBLISH_S:
            self._published_at = now
            self._publish_changes()
        if now - self._measured_at >= BEAT_S:
            self._measured_at = now
            samples = self._scheduler.drain_samples()
            if samples:
                self._call_back(self._tell_all, Measured(samples))
        return busy

    def _publish_changes(self) -> None:
        events = self._replica.drain_block_events()
        if events:
            self._call_back(self._tell_subscribers, self._publisher.publish(Tier.DEVICE, events))

    def _answer(self, link: GatewayLink, number: int) -> None:
        """On the engine thread: what was published before and after the snapshot is told before and after it."""
        self._publish_changes()
        parts = self._publisher.snapshot(number, {Tier.DEVICE: self._replica.block_hashes()})
        self._call_back(self._send_snapshot, link, parts)

    def _send_snapshot(self, link: GatewayLink, parts: list[BlockSnapshot]) -> None:
        if not link.closed:
            self._subscribers.add(link)
            for part in parts:
                link.send(part)

    def _tell_subscribers(self, message: BlockEvents) -> None:
        for link in self._subscribers:
            link.send(message)

    def _tell_all(self, message: Measured) -> None:
        for link in self._server.links:
            link.send(message)

    def _cancel(self, key: Key) -> None:
        """On the engine thread, so that the transfer layer hears of it behind whatever the scheduler asked of it."""
        self._scheduler.cancel(key)
        self._on_cancel(key)
        if self._donor is not None:
            self._donor.give_up(key, RequestCancelled("the gateway cancelled the request"))

    def _problem(self, request: Request) -> BatonError | None:
        if self.draining or self._stopping:
            return CapacityError("this worker is draining")
        if not self.healthy:
            return WorkerDied("the engine of this worker has stopped")
        return self._fault_of(request)

    def _fault_of(self, request: Request) -> BatonError | None:
        total = request.num_prompt_tokens + request.sampling.max_tokens
        if not 0 < request.num_prompt_tokens <= len(request.token_ids) or request.sampling.max_tokens < 1:
            return RequestError("the prompt is empty, or there is nothing to generate", "prompt")
        if total > self._replica.max_model_len:
            return RequestTooLong(
                f"{total} tokens of prompt and answer, the limit is {self._replica.max_model_len}", "prompt"
            )
        if min(request.token_ids) < 0 or max(request.token_ids) >= self._replica.vocab_size:
            return RequestError(f"token ids must be in [0, {self._replica.vocab_size})", "prompt")
        return None

    def _call_back(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
            self._loop.call_soon_threadsafe(function, *args)

    def _send_tokens(self, chunks: list[TokenChunk]) -> None:
        frames: dict[GatewayLink, list[TokenChunk]] = defaultdict(list)
        for chunk in chunks:
            key = (chunk.request_id, chunk.epoch)
            owner = self._owners.get(key)
            if owner is not None:
                frames[owner].append(chunk)
                if chunk.finish_reason is not None:
                    self._forget(key)
        for owner, mine in frames.items():
            self._send_together(owner, mine)

    def _send_together(self, owner: GatewayLink, chunks: list[TokenChunk]) -> None:
        """In one frame; where none is large enough one by one, and what is too large by itself fails alone."""
        try:
            owner.send(Tokens(chunks))
        except ProtocolError:
            if len(chunks) > 1:
                for chunk in chunks:
                    self._send_together(owner, [chunk])
                return
            key = (chunks[0].request_id, chunks[0].epoch)
            self.give_up(key)
            owner.send(_failure(key, RequestError("the log probabilities are too many to be sent at once", "logprobs")))

    def _send_failure(self, key: Key, error: BatonError) -> None:
        owner = self._owners.get(key)
        self._forget(key)
        if owner is not None:
            owner.send(_failure(key, error))

    def _expire(self, key: Key) -> None:
        owner = self._owners.get(key)
        self.give_up(key)
        if owner is not None:
            owner.send(_failure(key, DeadlineExceeded("the request's deadline has passed")))

    def _forget(self, key: Key) -> None:
        self._owners.pop(key, None)
        handle = self._deadlines.pop(key, None)
        if handle is not None:
            handle.cancel()
        if not self._owners:
            self._at_rest.set()

    def _on_crash(self, error: BaseException) -> None:
        self._failed = True
        self._call_back(self._fail_all, WorkerDied(f"the engine stopped: {type(error).__name__}: {error}"))

    def _fail_all(self, error: BatonError) -> None:
        for key in list(self._owners):
            self._send_failure(key, error)

    async def _beat(self) -> None:
        """Load at most every 250 ms where it changed, and every 500 ms regardless; the statistics once a second."""
        last, quiet = None, 0
        stats = self._replica.stats
        told_at = began_at = time.monotonic()
        while True:
            before, began_at = began_at, time.monotonic()
            self._watch_steps(began_at - before)
            self._server.watch()
            if began_at - told_at >= STATS_S:
                told_at = began_at
                self._server.tell(stats.snapshot())
            load = self.load()
            if self.healthy and (load != last or quiet >= MAX_QUIET):  # else silence: nothing more comes of it
                self._server.broadcast(load)
                last, quiet = load, 0
            else:
                quiet += 1
            await asyncio.sleep(BEAT_S)
            stats.loop_lag_s = max(stats.loop_lag_s, time.monotonic() - began_at - BEAT_S)

    def _watch_steps(self, elapsed_s: float) -> None:
        """A step that never ends: its requests go on elsewhere, and the fleet replaces this worker.

        Time in which this loop itself was held up does not count: then the whole process was.
        """
        rounds = self._engine_thread.num_rounds
        self._stalled_s = 0.0 if rounds != self._rounds_seen else self._stalled_s + min(elapsed_s, 2 * BEAT_S)
        self._rounds_seen = rounds
        if not self._failed and self._engine_thread.alive and self._stalled_s > self._step_timeout_s:
            self._failed = True
            logger.error("a step has been running for %.1f s", self._stalled_s)
            self._fail_all(WorkerDied(f"a step of the engine hangs: {self._stalled_s:.1f} s"))


def _failure(key: Key, error: BatonError) -> Failed:
    return Failed(key[0], key[1], error.code, str(error), error.retryable)
