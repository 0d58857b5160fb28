"""Life of a request in the gateway: placed on workers, journaled, moved when a worker dies, always released."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

import msgspec

from engine_core.errors import BatonError, CapacityError, DeadlineExceeded, NoWorkerAvailable, WorkerDied
from engine_core.messages import Cancel, Decode, Failed, Prefill, TokenChunk, Tokens, WorkerInfo
from engine_core.types import Request
from router.clients import MakeClient
from router.config import GatewayConfig
from router.fleet_view import FleetView
from router.history import History
from router.loop_lag import watch_loop
from router.mailbox import Item, Mailbox
from router.metrics import Metrics
from router.placement import LeastLoad, Placement
from router.registry import Registry, WorkerState
from router.slow_requests import SlowRequests
from router.stream import Stage, Stream
from router.tokenizer import TextCodec
from router.version import version

logger = logging.getLogger(__name__)

DEADLINE_INTERVAL_S = 0.5
RETRY_DELAY_S = 0.05  # before a request goes to a worker that failed it, times the number of attempts


class Generation:
    """The choices of one HTTP request. Close it on every path: that frees whatever the workers still hold."""

    def __init__(self, service: Service, streams: Sequence[Stream], mailbox: Mailbox) -> None:
        self._service = service
        self._streams = streams
        self._mailbox = mailbox

    async def take(self) -> list[Item]:
        """Wait for chunks of any choice; take all that are here.

        Raises:
            BatonError: a choice ended without an answer; the others are of no use then.
        """
        return await self._mailbox.take()

    def stop(self, index: int) -> None:
        """Enough of choice `index`: a stop string was found."""
        self._service.cancel(self._streams[index], "stop")

    def cached_tokens(self, n: int) -> int:
        """Prompt tokens that were found in a prefix cache, counted for one of the `n` choices of each prompt."""
        return sum(stream.cached_tokens for stream in self._streams[::n])

    def close(self) -> None:
        """Cancel what has not ended."""
        for stream in self._streams:
            self._service.cancel(stream, "cancelled")


class Service:
    """Sends requests to workers and hears their answers. Everything runs on the event-loop thread."""

    def __init__(self, config: GatewayConfig, codec: TextCodec, make_client: MakeClient) -> None:
        self.config = config
        self.codec = codec
        self.metrics = Metrics(config, version())
        self.history = History(self.metrics, time.time)
        self.slow_requests = SlowRequests(time.time)
        self.fleet: FleetView | None = None
        self.draining = False
        self.registry = Registry(
            self,
            make_client,
            colocated=config.colocated,
            suspect_after_s=config.suspect_after_s,
            lost_after_s=config.lost_after_s,
        )
        self.metrics.workers = self.registry.workers.values()
        self._placement = LeastLoad(self.registry, config.local_prefill_tokens)
        self._streams: dict[str, Stream] = {}
        self._retries: set[asyncio.Task[None]] = set()
        self._watch_tasks: list[asyncio.Task[None]] = []
        self._deadline_ms = int(config.request_timeout_s * 1000)

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: names the numerics mode and the model."""
        return f"baton-{self.registry.numerics}-{self.registry.fingerprint[:12]}"

    def start(self) -> None:
        """Begin to watch the workers and the time."""
        self.registry.start()
        watches = (self._watch_deadlines(), watch_loop(self.metrics.loop_lag.observe), self.history.watch())
        self._watch_tasks = [asyncio.get_running_loop().create_task(watch) for watch in watches]

    def follow(self, workers: Sequence[WorkerInfo]) -> None:
        """These workers serve, and no others."""
        self.registry.update(workers)

    async def close(self) -> None:
        """End what runs; hang up on all workers."""
        self.draining = True
        for stream in list(self._streams.values()):
            self._fail(stream, CapacityError("the gateway is shutting down"))
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

    async def generate(self, requests: Sequence[Request], arrived_at: float) -> Generation:
        """Place every request; the i-th becomes choice i.

        Raises:
            CapacityError: draining, too much in progress, or no worker within the time allowed.
        """
        if self.draining:
            raise CapacityError("the gateway is shutting down")
        if len(self._streams) + len(requests) > self.config.max_concurrent_choices:
            raise CapacityError("too many requests in progress")
        mailbox = Mailbox()
        streams = [Stream(request, index, mailbox, arrived_at) for index, request in enumerate(requests)]
        generation = Generation(self, streams, mailbox)
        for stream in streams:
            self._streams[stream.request.request_id] = stream
        self.metrics.running_streams = len(self._streams)
        try:
            for stream in streams:
                if not self.registry.decode:
                    await self._wait_for_worker()
                self._send(stream, self._placement.place(stream.request))
        except BaseException:
            generation.close()
            raise
        for request in requests:
            self.metrics.accepted(request.num_prompt_tokens)
        return generation

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
            self._attempt_failed(stream, _as_error(message), worker)

    def on_lost(self, worker: WorkerState, error: BatonError) -> None:
        """All that was asked of the worker is lost."""
        for stream in list(worker.streams):
            self._attempt_failed(stream, error, worker)

    # one stream

    def _deliver(self, stream: Stream, chunk: TokenChunk, now: float) -> None:
        """Pass on an accepted chunk, and those that waited for it."""
        journal, metrics = stream.journal, self.metrics
        following: TokenChunk | None = chunk
        while following is not None:
            chunk = following
            if stream.stage is not Stage.DECODING:
                stream.advance()
            if stream.last_at:
                metrics.itl.observe(now - stream.last_at)
            else:
                stream.first_at = now
                metrics.ttft.observe(now - stream.arrived_at)
                stream.cached_tokens = min(chunk.cached_tokens, stream.request.num_prompt_tokens)
                metrics.cached_tokens += stream.cached_tokens
            stream.last_at = now
            metrics.generated_tokens += len(chunk.token_ids)
            stream.mailbox.put(stream.index, chunk)
            if chunk.finish_reason is not None:
                stream.detach()
                self._end(stream, chunk.finish_reason)
                return
            following = journal.next_early()
            if following is not None and not journal.accept(following):
                return

    def _send(self, stream: Stream, placement: Placement) -> None:
        """Start an attempt: both workers hear of it at the same time."""
        stream.attach(placement)
        request, prefill = stream.request, placement.prefill
        if stream.route is not None:
            self.metrics.placed(stream.route.prefill, stream.route.decode)
        try:
            if prefill is not None:
                prefill.client.send(Prefill(request, self._deadline_ms))
            address = prefill.info.address if prefill is not None else None
            placement.decode.client.send(Decode(request, address, self._deadline_ms))
        except WorkerDied as error:
            self._attempt_failed(stream, error, None)

    def _attempt_failed(self, stream: Stream, error: BatonError, culprit: WorkerState | None) -> None:
        """Move the stream elsewhere, from prompt plus what was generated; or give up."""
        self._abandon_attempt(stream)
        if not error.retryable or stream.journal.epoch + 1 >= self.config.max_attempts or self.draining:
            self._fail(stream, error)
            return
        if culprit is not None:
            stream.avoid.append(culprit)
        self.metrics.retries[error.code] += 1
        epoch = stream.journal.restart()
        request = stream.request
        prompt = request.token_ids[: request.num_prompt_tokens]
        stream.request = msgspec.structs.replace(request, token_ids=prompt + stream.journal.token_ids, epoch=epoch)
        logger.warning("request %s: attempt %d after: %s", request.request_id, epoch + 1, error)
        task = asyncio.get_running_loop().create_task(self._retry(stream))
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)

    async def _retry(self, stream: Stream) -> None:
        epoch = stream.journal.epoch
        try:
            while not stream.ended and stream.journal.epoch == epoch:
                if not self.registry.decode:
                    await self._wait_for_worker()
                    continue
                placement = self._placement.place(stream.request, stream.avoid)
                if placement.decode not in stream.avoid and placement.prefill not in stream.avoid:
                    self._send(stream, placement)
                    return
                placement.release()
                await asyncio.sleep(RETRY_DELAY_S * epoch)
                stream.avoid.clear()
        except BatonError as error:
            if not stream.ended:
                self._fail(stream, error)

    def _abandon_attempt(self, stream: Stream) -> None:
        """Release the attempt, and tell its workers so."""
        message = Cancel(stream.request.request_id, stream.journal.epoch)
        for worker in stream.detach():
            with contextlib.suppress(WorkerDied):
                worker.client.send(message)

    def _fail(self, stream: Stream, error: BatonError) -> None:
        self._end(stream, "error")
        stream.mailbox.fail(error)

    def _end(self, stream: Stream, reason: str) -> None:
        stream.ended = True
        self._streams.pop(stream.request.request_id, None)
        self.metrics.running_streams = len(self._streams)
        self.metrics.ended(stream, reason)
        self.slow_requests.record(stream, reason, asyncio.get_running_loop().time())
        self.registry.forget_idle()

    async def _watch_deadlines(self) -> None:
        """End what takes too long. One task for all: a timer per request would cost as much as placing it."""
        limit_s = self.config.request_timeout_s
        interval_s = min(DEADLINE_INTERVAL_S, limit_s)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(interval_s)
            oldest = loop.time() - limit_s
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


def _subclasses(kind: type[BatonError]) -> Iterator[type[BatonError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _subclasses(child)


def _as_error(message: Failed) -> BatonError:
    """The exception that the worker had."""
    by_code = {kind.code: kind for kind in _subclasses(BatonError)}
    kind = by_code.get(message.code, BatonError)
    error = kind(message.message)
    error.code = message.code
    error.retryable = message.retryable
    return error
