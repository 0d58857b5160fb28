"""Life of a request in the gateway: placed on workers, journaled, moved when a worker dies, always released."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from engine_core.errors import (
    BatonError,
    CapacityError,
    DeadlineExceeded,
    NoWorkerAvailable,
    Overloaded,
    PoisonRequest,
    RequestError,
    TransferError,
    WorkerDied,
    WorkerLeaving,
)
from engine_core.messages import Cancel, Decode, Donate, Failed, PeerAddress, Prefill, TokenChunk, Tokens, WorkerInfo
from engine_core.types import Request, Role
from router.block_index import BlockIndex
from router.clients import MakeClient
from router.compiled.library import Compiled
from router.config import GatewayConfig
from router.cost_model import TransferModel
from router.decision import Decisions
from router.failures import error_of
from router.fleet_view import FleetView
from router.generation import Generation
from router.history import History
from router.load_meter import LoadMeter, LoadTotals
from router.loop_lag import watch_loop
from router.mailbox import Mailbox
from router.metrics import Metrics
from router.pair_costs import PlacementConfig
from router.placement import JointPlacement, Placement
from router.registry import Registry, WorkerState
from router.retry_budget import RetryBudget
from router.slow_requests import SlowRequests
from router.stream import Stage, Stream
from router.tokenizer import TextCodec
from router.version import version
from router.waiting_room import WaitingRoom, too_late
from router.wishes import Wishes

if TYPE_CHECKING:  # the library is optional
    from router.tracing import Tracing

logger = logging.getLogger(__name__)

DEADLINE_INTERVAL_S = 0.5
ID_BYTES = 16
IDS_AT_ONCE = 256
INDEX_BLOCKS = 100_000  # room to begin with; it grows
VERDICT_S = 1.0  # a lost worker that is back within this time did not die
RETRY_DELAY_S = 0.05  # before a request goes to a worker that failed it, times the number of attempts


class Service:
    """Sends requests to workers and hears their answers. Made and used on the event-loop thread.

    Args:
        salt: secret; keys the block hashes. The same in all gateways of a cluster.
        compiled: what is compiled of placement; None: nothing is.

    Attributes:
        decisions: why recent requests went where they did.
    """

    def __init__(
        self, config: GatewayConfig, codec: TextCodec, make_client: MakeClient, salt: bytes, compiled: Compiled | None
    ) -> None:
        self.config = config
        self.codec = codec
        self.salt = salt
        self.metrics = Metrics(config, version())
        self.history = History(self.metrics, time.time)
        self.slow_requests = SlowRequests(time.time)
        self.tracing: Tracing | None = None
        self.meter = LoadMeter(config.slo_ttft_s, config.slo_itl_s)
        self.fleet: FleetView | None = None
        self.decisions = Decisions()
        self.index = BlockIndex(INDEX_BLOCKS, compiled)
        transfers = TransferModel()
        self.draining = False
        self.registry = Registry(
            self,
            make_client,
            index=self.index,
            transfers=transfers,
            colocated=config.colocated,
            suspect_after_s=config.suspect_after_s,
            lost_after_s=config.lost_after_s,
        )
        self.metrics.workers = self.registry.workers.values()
        self.metrics.index = self.index
        self._placement = JointPlacement(
            self.index,
            transfers,
            PlacementConfig(local_prefill_tokens=config.local_prefill_tokens, max_backlog_s=config.max_backlog_s),
            compiled,
        )
        self._waiting = WaitingRoom(config, self.registry, self._placement, self.metrics, self._place)
        self._retry_budget = RetryBudget()
        self._streams: dict[str, Stream] = {}
        self._retries: set[asyncio.Task[None]] = set()
        self._watch_tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()  # asking for it costs a system call before Python 3.12
        self.new_request_id = _draw_ids().__next__

    def now(self) -> float:
        """The event loop's clock."""
        return self._loop.time()

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: names the numerics mode and the model."""
        return f"baton-{self.registry.numerics}-{self.registry.fingerprint[:12]}"

    def start(self) -> None:
        """Begin to watch the workers and the time."""
        self.registry.start()
        watches = (self._watch_deadlines(), watch_loop(self.metrics.beat), self.history.watch())
        self._watch_tasks = [self._loop.create_task(watch) for watch in watches]

    def follow(self, workers: Sequence[WorkerInfo]) -> None:
        """These workers serve, and no others."""
        self.registry.update(workers)

    def end_all(self) -> None:
        """No time is left: whoever still waits hears so, and may try another gateway."""
        self.draining = True
        self._waiting.close(CapacityError("the gateway is shutting down"))
        for stream in list(self._streams.values()):
            self._abandon_attempt(stream)
            self._fail(stream, CapacityError("the gateway is shutting down"))

    async def close(self) -> None:
        """End what runs; hang up on all workers."""
        self.end_all()
        tasks = [*self._retries, *self._watch_tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.registry.close()

    async def context_length(self) -> int:
        """Tokens of prompt plus answer that the workers take; waits for one to appear."""
        if not self.registry.decode:
            await self._wait_for_worker()
        return self.registry.max_model_len

    async def generate(self, requests: Sequence[Request], arrived_at: float, wishes: Wishes) -> Generation:
        """Place every request, as soon as there is room; the i-th becomes choice i.

        Raises:
            Overloaded: too much in progress, or it would take too long.
            CapacityError: draining, or no worker within the time allowed.
        """
        if self.draining:
            raise CapacityError("the gateway is shutting down")
        self.meter.arrived(len(requests))
        if len(self._streams) + len(requests) > self.config.max_concurrent_choices:
            raise Overloaded("too many requests in progress", "too_many_requests", 1.0)
        mailbox = Mailbox(self._loop)
        streams = [Stream(request, i, mailbox, arrived_at, wishes.session) for i, request in enumerate(requests)]
        for stream in streams:
            stream.traceparent = wishes.traceparent
        generation = Generation(self, streams, mailbox)
        for stream in streams:
            self._streams[stream.request.request_id] = stream
        self.metrics.running_streams = len(self._streams)
        try:
            for stream in streams:
                self._retry_budget.requested()
                may_be_placed = not stream.ended and self.registry.decode
                if not may_be_placed or not self._waiting.admit_at_once(stream, wishes, self.now()):
                    await self._admit(stream, wishes)
        except BaseException as error:
            if isinstance(error, BatonError):
                self._withdraw(streams)
            generation.close()
            raise
        for request in requests:
            self.metrics.accepted(request.num_prompt_tokens)
        return generation

    async def _admit(self, stream: Stream, wishes: Wishes) -> None:
        """Place it as soon as there is room; not if its time has run out before: who reads the answer hears so."""
        if not self.registry.decode:
            await self._wait_for_worker()
        if not stream.ended:
            await self._waiting.admit(stream, wishes, self.now())

    def measure(self) -> LoadTotals:
        """What this gateway tells the autoscaler."""
        refused = sum(self.metrics.refused.values())
        return self.meter.read(self.now(), self._streams.values(), refused, self.registry.candidates[Role.DECODE])

    def cancel(self, stream: Stream, reason: str) -> None:
        """Free everything that the stream holds, here and on the workers; ended streams hold nothing."""
        if not stream.ended:
            self._abandon_attempt(stream)
            self._end(stream, reason)

    # FleetListener

    def on_tokens(self, message: Tokens, now: float) -> None:
        """New tokens of this gateway's requests."""
        find = self._streams.get
        for chunk in message.chunks:
            stream = find(chunk.request_id)
            if stream is not None and stream.journal.accept(chunk):
                self._deliver(stream, chunk, now)

    def on_failed(self, worker: WorkerState, message: Failed) -> None:
        """A request ended without an answer; a prefill worker that is no longer needed may say what it likes."""
        stream = self._streams.get(message.request_id)
        if stream is not None and stream.journal.epoch == message.epoch and stream in worker.streams:
            error = error_of(message)
            if isinstance(error, WorkerDied):  # its engine has stopped, whatever else of it still runs
                worker.lose(error)
                return
            self._blame(stream, worker, error)
            self._attempt_failed(stream, error, worker)

    def _blame(self, stream: Stream, worker: WorkerState, error: BatonError) -> None:
        """Tell the breakers; a hand-over that failed may be either side's fault. Fullness and time's end are none."""
        if isinstance(error, (CapacityError, RequestError, DeadlineExceeded)):
            return
        worker.candidate.breaker.failed(self.now())
        if isinstance(error, TransferError) and stream.prefill is not None and stream.prefill is not worker:
            stream.prefill.candidate.breaker.failed(self.now())

    def on_lost(self, worker: WorkerState, error: BatonError) -> None:
        """All that was asked of the worker is lost."""
        if worker.streams:
            worker.candidate.breaker.failed(self.now())
        for stream in list(worker.streams):
            self._attempt_failed(stream, error, worker)

    def on_leaving(self, worker: WorkerState) -> None:
        """Its streams go on elsewhere at once, from prompt plus what was generated, where some other worker decodes."""
        if not self.registry.decode or self.draining:
            return
        for stream in list(worker.streams):
            if stream.decode is worker:
                self._abandon_attempt(stream)
                self._start_again(stream, WorkerLeaving(f"worker {worker.name} is leaving"))

    def on_room(self, now: float) -> None:
        """Place those that wait, as long as there is room."""
        self._waiting.on_room(now)

    # one stream

    def _choose(self, stream: Stream, now: float) -> Placement:
        candidates = self.registry.candidates
        started = time.perf_counter()
        placement = self._placement.place(
            stream.request,
            candidates[Role.PREFILL],
            candidates[Role.DECODE],
            now=now,
            avoid=stream.avoid,
            session=stream.session,
            donors=stream.may_fetch,
        )
        self.metrics.decision.observe(time.perf_counter() - started)
        self.metrics.terms.observe(placement.decision.chosen.terms)
        self.registry.fold_soon()
        return placement

    def _place(self, stream: Stream, now: float) -> None:
        """First attempt. Raises Overloaded where even the best pair would be too late."""
        placement = self._choose(stream, now)
        ttft_s = placement.decision.chosen.terms.ttft_s
        if stream.due is not None and now + ttft_s > stream.due:
            placement.release(now)
            raise too_late(ttft_s)
        self._send(stream, placement)

    def _deliver(self, stream: Stream, chunk: TokenChunk, now: float) -> None:
        """Pass on an accepted chunk, and those that waited for it."""
        journal, metrics = stream.journal, self.metrics
        following: TokenChunk | None = chunk
        while following is not None:
            chunk = following
            if chunk.stage_s and self.tracing is not None:
                stream.heard_stages(chunk, now)
            if stream.stage is not Stage.DECODING:
                self._advance(stream, chunk, now)
            if stream.last_at:
                metrics.itl.observe(now - stream.last_at)
            else:
                stream.first_at = now
                metrics.ttft.observe(now - stream.arrived_at)
                self.meter.first_token(now - stream.arrived_at)
            stream.last_at = now
            metrics.generated_tokens += len(chunk.token_ids)
            stream.mailbox.put(stream.index, chunk)
            if chunk.finish_reason is not None:
                stream.detach(now)
                self._placement.finished(len(journal.token_ids))
                self._end(stream, chunk.finish_reason)
                return
            following = journal.next_early() if journal.early else None
            if following is not None and not journal.accept(following):
                return

    def _send(self, stream: Stream, placement: Placement) -> None:
        """Start an attempt: its workers hear of it at the same time."""
        workers, request = self.registry.workers, stream.request
        prefill = workers[placement.prefill.key] if placement.prefill is not None else None
        decode = workers[placement.decode.key]
        donor = workers[placement.donor.key] if placement.donor is not None else None
        now = self.now()
        deadline_ms = max(1, int(1000 * (stream.arrived_at + self.config.request_timeout_s - now)))
        stream.attach(placement, prefill, decode, donor)
        stream.sent_at = now
        if self.tracing is not None:
            stream.begin_attempt()
        self.decisions.record(placement.decision)
        source = prefill.info.worker_id if prefill else None
        self.metrics.placed(source, decode.info.worker_id, fetches=donor is not None)
        if not stream.journal.epoch:
            self.meter.placed(placement.decision.chosen.terms.prefill_s, self._placement.network_s(placement))
        try:
            if prefill is not None:
                giver = self._ask_donor(stream, placement.donor_blocks, deadline_ms)
                prefill.client.send(Prefill(request, deadline_ms, giver, placement.donor_blocks if giver else 0))
            address = prefill.info.address if prefill is not None else None
            decode.client.send(Decode(request, address, deadline_ms))
        except WorkerDied as error:
            self._attempt_failed(stream, error, None)

    def _ask_donor(self, stream: Stream, num_blocks: int, deadline_ms: int) -> PeerAddress | None:
        """Where the prefill worker finds blocks, if anywhere: one that is lost is done without."""
        donor = stream.donor
        if donor is None:
            return None
        try:
            donor.client.send(Donate(stream.request, num_blocks, deadline_ms))
        except WorkerDied:
            stream.dismiss_donor()
            return None
        return donor.info.address

    def _dismiss_donor(self, stream: Stream) -> None:
        """What it may still hold for the prompt is not wanted any more. A decode worker goes on under the same key."""
        donor = stream.dismiss_donor()
        if donor is not None and donor is not stream.decode:
            with contextlib.suppress(WorkerDied):
                donor.client.send(Cancel(stream.request.request_id, stream.journal.epoch))

    def _advance(self, stream: Stream, chunk: TokenChunk, now: float) -> None:
        """One of the first two chunks of an attempt: what it tells of the workers."""
        placement = stream.placement
        if placement is None:
            return
        stream.cached_tokens = max(stream.cached_tokens, min(chunk.cached_tokens, stream.request.num_prompt_tokens))
        if stream.stage is Stage.READING:
            predicted_s = placement.decision.chosen.terms.ttft_s
            self.metrics.ttft_error.observe(now - stream.sent_at - predicted_s)
            (placement.prefill or placement.decode).breaker.succeeded()
            self._dismiss_donor(stream)
        else:
            placement.decode.breaker.succeeded()
            self._placement.handed_over(placement, now - stream.last_at)
        stream.advance(now)
        if self._waiting:
            self.on_room(now)

    def _attempt_failed(self, stream: Stream, error: BatonError, culprit: WorkerState | None) -> None:
        """Move the stream elsewhere, from prompt plus what was generated; or give up."""
        if stream.placement is not None and stream.placement.donor is not None:
            stream.may_fetch = False
        self._abandon_attempt(stream)
        journal, record = stream.journal, stream.failures
        key = (culprit.info.worker_id, culprit.info.incarnation) if culprit is not None else None
        now = self.now()
        record.note(journal.start, len(journal.token_ids), error, key, now)
        final = not error.retryable or record.is_hopeless(self.config.max_attempts, error, now) or self.draining
        if final or not (isinstance(error, WorkerDied) or self._retry_budget.take()):
            self._fail(stream, error)
            return
        if culprit is not None:
            stream.avoid.append(culprit.candidate.key)
        self._start_again(stream, error)

    def _start_again(self, stream: Stream, error: BatonError) -> None:
        """The next attempt, behind what the client has."""
        self.metrics.retries[error.code] += 1
        epoch = stream.journal.restart()
        request = stream.request
        prompt = request.token_ids[: request.num_prompt_tokens]
        stream.request = msgspec.structs.replace(request, token_ids=prompt + stream.journal.token_ids, epoch=epoch)
        logger.warning("request %s: attempt %d after: %s", request.request_id, epoch + 1, error)
        task = self._loop.create_task(self._retry(stream))
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)

    async def _retry(self, stream: Stream) -> None:
        epoch = stream.journal.epoch
        try:
            await self._clear_of_suspicion(stream)
            await asyncio.sleep(RETRY_DELAY_S * (stream.failures.num_futile - 1))
            while not stream.ended and stream.journal.epoch == epoch:
                if not self.registry.decode:
                    await self._wait_for_worker()
                    continue
                placement = self._choose(stream, self.now())
                if placement.decode.key not in stream.avoid:
                    self._send(stream, placement)
                    return
                placement.release(self.now())
                await asyncio.sleep(RETRY_DELAY_S * epoch)
                stream.avoid.clear()
        except BatonError as error:
            if not stream.ended:
                self._fail(stream, error)

    async def _clear_of_suspicion(self, stream: Stream) -> None:
        """Return once it is known that workers did not die of this request. Raises PoisonRequest where they did."""
        victims = stream.failures.victims
        until = self.now() + VERDICT_S
        while stream.failures.is_suspect and not stream.ended:
            back = [key for key in victims if key in self.registry.workers and self.registry.workers[key].connected]
            for key in back:
                victims.remove(key)
            if not back and self.now() >= until:
                names = ", ".join(f"{worker_id}.{life}" for worker_id, life in victims)
                raise PoisonRequest(f"workers {names} died at the same token of this request; it is not tried again")
            await asyncio.sleep(RETRY_DELAY_S)

    def _abandon_attempt(self, stream: Stream) -> None:
        """Release the attempt, and tell its workers so."""
        message = Cancel(stream.request.request_id, stream.journal.epoch)
        for worker in stream.detach(self.now()):
            with contextlib.suppress(WorkerDied):
                worker.client.send(message)

    def _fail(self, stream: Stream, error: BatonError) -> None:
        self._end(stream, "error")
        stream.mailbox.fail(error)

    def _end(self, stream: Stream, reason: str) -> None:
        stream.ended = True
        self._streams.pop(stream.request.request_id, None)
        self.metrics.running_streams = len(self._streams)
        self.metrics.cached_tokens += stream.cached_tokens
        if self._waiting:
            self.on_room(self.now())
        self.metrics.ended(stream, reason)
        if reason != "cancelled":
            self.meter.ended(stream)
        if self.tracing is not None:
            self.tracing.ended(stream, reason, self.now())
        self.slow_requests.record(stream, reason, self.now())
        self.registry.forget_idle()

    def _withdraw(self, streams: Sequence[Stream]) -> None:
        """They are refused: those that were never placed are no choices that ended, and no client has left."""
        for stream in streams:
            if stream.route is None and not stream.ended:
                stream.ended = True
                del self._streams[stream.request.request_id]
                if self.tracing is not None:
                    self.tracing.ended(stream, "error", self.now())
        self.metrics.running_streams = len(self._streams)

    async def _watch_deadlines(self) -> None:
        """End what takes too long. One task for all: a timer per request would cost as much as placing it."""
        limit_s = self.config.request_timeout_s
        interval_s = min(DEADLINE_INTERVAL_S, limit_s)
        while True:
            await asyncio.sleep(interval_s)
            now = self.now()
            self._waiting.expire(now)
            oldest = now - limit_s
            for stream in list(self._streams.values()):  # in order of arrival
                if stream.arrived_at > oldest:
                    break
                self._abandon_attempt(stream)
                self._fail(stream, DeadlineExceeded(f"the request took longer than {limit_s:g} s"))

    async def _wait_for_worker(self) -> None:
        try:
            async with asyncio.timeout(self.config.worker_wait_s):
                while not self.registry.decode:
                    await self.registry.wait_for_change()
        except TimeoutError:
            raise NoWorkerAvailable("no decode worker is available; try again later") from None


def _draw_ids() -> Iterator[str]:
    """128 random bits each, in hex. Many are drawn at once: each draw is a system call."""
    while True:
        drawn = secrets.token_hex(ID_BYTES * IDS_AT_ONCE)
        for at in range(0, len(drawn), 2 * ID_BYTES):
            yield drawn[at : at + 2 * ID_BYTES]
