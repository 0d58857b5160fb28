"""The hot path: one ASGI callable per generating endpoint, below FastAPI's middleware and dependency machinery."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus

from starlette.types import Receive, Scope, Send

from engine_core.errors import BatonError, CapacityError
from router.answers import usage_of
from router.dialects import Dialect, Job
from router.generation import Generation
from router.http import (
    SSE_HEADERS,
    ClientGone,
    Headers,
    HttpError,
    KeyCheck,
    check_json_type,
    error_json,
    read_body,
    send_error,
    send_json,
)
from router.mailbox import joined
from router.service import Service
from router.wishes import Wishes, read_wishes

logger = logging.getLogger(__name__)

WATCH_AFTER_S = 0.1


class GenerateEndpoint:
    """POST of one dialect."""

    def __init__(self, service: Service, dialect: Dialect, check_key: KeyCheck) -> None:
        self._service = service
        self._dialect = dialect
        self._check_key = check_key
        self._watches = DisconnectWatches()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Nothing that happens here reaches another one."""
        exchange = Exchange(self._service, send)
        arrived_at = self._service.now()
        watch: DisconnectWatch | None = None
        try:
            if scope["method"] != "POST":
                raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "use POST", "method_not_allowed")
            wishes = read_wishes(scope, self._check_key(scope))
            check_json_type(scope)
            body = await read_body(scope, receive, self._service.config.max_body_bytes)
            watch = self._watches.open(receive)
            await exchange.run(await self._dialect.prepare(body), arrived_at, wishes)
        except ClientGone:
            exchange.status = ClientGone.http_status
        except asyncio.CancelledError:
            if watch is None or not watch.gone:
                raise
            exchange.status = ClientGone.http_status
        except BatonError as error:
            await exchange.fail(error, watch)
        except Exception:
            logger.exception("unexpected error while serving %s", self._dialect.name)
            await exchange.fail(BatonError("the server had an error while processing your request"), watch)
        finally:
            if watch is not None:
                self._watches.close(watch)
            self._service.metrics.requests[self._dialect.name, exchange.status] += 1
            self._service.metrics.disconnects += exchange.status == ClientGone.http_status


class DisconnectWatch:
    """Cancels the current task when the client goes away, wherever it waits.

    Attributes:
        gone: whether that happened.
    """

    __slots__ = ("_loop", "_owner", "_receive", "_task", "gone")

    def __init__(self, receive: Receive, loop: asyncio.AbstractEventLoop) -> None:
        self.gone = False
        self._receive = receive
        self._loop = loop
        self._owner = asyncio.current_task(loop)
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look from now on."""
        self._task = self._loop.create_task(_until_disconnect(self._receive))
        self._task.add_done_callback(self._on_done)

    def close(self) -> None:
        """The response is complete."""
        self._owner = None
        if self._task is not None:
            self._task.cancel()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if self._owner is not None and not task.cancelled():
            self.gone = True
            self._owner.cancel()


class DisconnectWatches:
    """Begins those of responses that take longer than a moment: a watch is a task, and so is none of most."""

    def __init__(self) -> None:
        self._waiting: set[DisconnectWatch] = set()
        self._is_due = False
        self._loop = asyncio.get_running_loop()

    def open(self, receive: Receive) -> DisconnectWatch:
        """Of a request that was read; it begins within `WATCH_AFTER_S`."""
        watch = DisconnectWatch(receive, self._loop)
        self._waiting.add(watch)
        if not self._is_due:
            self._is_due = True
            self._loop.call_later(WATCH_AFTER_S, self._begin)
        return watch

    def close(self, watch: DisconnectWatch) -> None:
        """The response is complete."""
        self._waiting.discard(watch)
        watch.close()

    def _begin(self) -> None:
        self._is_due = False
        for watch in self._waiting:
            watch.begin()
        self._waiting.clear()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Exchange:
    """One response.

    Attributes:
        status: for the metrics.
    """

    __slots__ = ("_debug", "_send", "_service", "_started", "status")

    def __init__(self, service: Service, send: Send) -> None:
        self._service = service
        self._send = send
        self._started = False
        self._debug = False
        self.status = 500

    async def run(self, job: Job, arrived_at: float, wishes: Wishes) -> None:
        """Generate and answer."""
        generation = await self._service.generate(job.requests, arrived_at, wishes)
        self._debug = wishes.debug
        try:
            if job.stream:
                await self._stream(job, generation)
            else:
                await self._whole(job, generation)
        finally:
            generation.close()

    async def fail(self, error: BatonError, watch: DisconnectWatch | None) -> None:
        """The error object, as a response or as the last event of a stream; whether anyone reads it or not."""
        if watch is not None:
            watch.close()
        self.status = error.http_status
        if isinstance(error, CapacityError):
            self._service.metrics.refused[error.reason] += 1
        if self._started:
            event = b"data: " + error_json(error) + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            await send_error(self._send, error)

    async def _whole(self, job: Job, generation: Generation) -> None:
        remaining = len(job.choices)
        until_end = not any(choice.has_stops for choice in job.choices)
        while remaining:
            items = await generation.take(until_end)
            for index, chunk in joined(items) if until_end else items:  # where nothing in a text ends it
                choice = job.choices[index]
                if choice.finish_reason is None:
                    job.writer.write(index, chunk)
                    if choice.finish_reason is not None:
                        remaining -= 1
                        if choice.stopped:
                            generation.stop(index)
        self.status = 200
        self._started = True
        await send_json(self._send, 200, job.writer.end(_usage(job, generation)), self._placed(generation))

    async def _stream(self, job: Job, generation: Generation) -> None:
        """Headers leave with the first tokens, and all that one wake-up finds leaves at once."""
        send, write, choices = self._send, job.writer.write, job.choices
        remaining = len(choices)
        while remaining:
            out = []
            for index, chunk in await generation.take():
                choice = choices[index]
                if choice.finish_reason is None:
                    out.append(write(index, chunk))
                    if choice.finish_reason is not None:
                        remaining -= 1
                        if choice.stopped:
                            generation.stop(index)
            if not self._started:
                self._started = True
                self.status = 200
                headers = SSE_HEADERS + self._placed(generation)
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            if not remaining:
                out.append(job.writer.end(_usage(job, generation)))
            body = b"".join(out)
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": remaining > 0})

    def _placed(self, generation: Generation) -> Headers:
        """A header that says where the first choice ran, for those who asked."""
        option = generation.placed() if self._debug else None
        if option is None:
            return []
        text = (
            f"prefill={option.prefill or option.decode}; decode={option.decode}; "
            f"held_prefill={option.held_prefill_tokens}; held_decode={option.held_decode_tokens}; "
            f"ttft_ms={1000 * option.terms.ttft_s:.2f}; cost_ms={1000 * option.terms.total_s:.2f}; "
            f"donor={option.donor or '-'}; fetched={option.fetched_tokens}"
        )
        return [(b"x-baton-placement", text.encode("latin-1", "replace"))]


def _usage(job: Job, generation: Generation) -> dict[str, object]:
    num_tokens = sum(choice.num_tokens for choice in job.choices)
    return usage_of(job.num_prompt_tokens, num_tokens, generation.cached_tokens(job.n))
