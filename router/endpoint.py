"""The hot path: one callable per generating endpoint, below FastAPI's middleware and dependency machinery."""

from __future__ import annotations

import asyncio
import logging

from engine_core.errors import BatonError, CapacityError
from router.answers import usage_of
from router.dialects import Dialect, Job
from router.generation import Generation
from router.http import (
    CLIENT_GONE,
    JSON_TYPE,
    SSE_HEADERS,
    Headers,
    HttpError,
    KeyCheck,
    check_json_type,
    error_headers,
    error_json,
)
from router.http_exchange import HttpExchange
from router.mailbox import joined
from router.service import Service
from router.wishes import Wishes, read_wishes

logger = logging.getLogger(__name__)


class GenerateEndpoint:
    """POST of one dialect. See `Endpoint`."""

    def __init__(self, service: Service, dialect: Dialect, check_key: KeyCheck) -> None:
        self.max_body_bytes = service.config.max_body_bytes
        self._service = service
        self._dialect = dialect
        self._check_key = check_key

    async def __call__(self, exchange: HttpExchange) -> None:
        """Serve one request. Nothing that happens here reaches another one."""
        service, headers = self._service, exchange.headers
        reply = Reply(service, exchange)
        arrived_at = service.now()
        try:
            wishes = read_wishes(headers, self._check_key(headers))
            check_json_type(headers)
            job = await self._dialect.prepare(await exchange.read())
            await reply.run(job, arrived_at, wishes)
        except asyncio.CancelledError:
            if not exchange.is_lost:
                raise
            reply.status = CLIENT_GONE
        except BatonError as error:
            reply.fail(error)
        except Exception:
            logger.exception("unexpected error while serving %s", self._dialect.name)
            reply.fail(BatonError("the server had an error while processing your request"))
        finally:
            exchange.give_up()
            service.metrics.requests[self._dialect.name, reply.status] += 1
            service.metrics.disconnects += reply.status == CLIENT_GONE


class Reply:
    """To one request.

    Attributes:
        status: for the metrics.
    """

    __slots__ = ("_debug", "_exchange", "_has_begun", "_service", "status")

    def __init__(self, service: Service, exchange: HttpExchange) -> None:
        self._service = service
        self._exchange = exchange
        self._has_begun = False
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

    def fail(self, error: BatonError) -> None:
        """The error object, as a response or as the last event of a stream; whether anyone reads it or not."""
        self.status = error.http_status
        if isinstance(error, CapacityError):
            self._service.metrics.refused[error.reason] += 1
        if self._has_begun:
            self._exchange.end(b"data: " + error_json(error) + b"\n\n")
        else:
            close = isinstance(error, HttpError) and error.close
            self._exchange.answer(self.status, error_headers(error), error_json(error), close=close)

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
        self._exchange.answer(200, [JSON_TYPE, *self._placed(generation)], job.writer.end(_usage(job, generation)))

    async def _stream(self, job: Job, generation: Generation) -> None:
        """Headers leave with the first tokens, and all that one wake-up finds leaves at once."""
        exchange, write, choices = self._exchange, job.writer.write, job.choices
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
            if not self._has_begun:
                self._has_begun = True
                self.status = 200
                exchange.begin(200, SSE_HEADERS + self._placed(generation))
            events = b"".join(out)
            if not remaining:
                exchange.end(events + job.writer.end(_usage(job, generation)))
            elif events:
                await exchange.write(events)

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
