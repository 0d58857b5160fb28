"""Optional traces: one OpenTelemetry span tree per choice, made when it ends from what the gateway and workers timed.

Workers only tell how long their stages took (`TokenChunk.stage_s`), and the gateway knows when it heard so: nothing is
recorded per token, clocks of several machines are never compared, and only the gateway needs the library.

Tree: `request` from arrival to the last token; in it, for each attempt, `placement wait`, `prefill` (with its `queue`),
`transfer` (with its `queue`) and `decode`.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine_core.errors import ConfigError
from router.stream import Attempt, Stream

_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


class Tracing:
    """Makes the spans of choices that ended.

    Args:
        provider: of tracers; whoever made it shuts it down.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("baton")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str, model_name: str) -> Tracing:
        """Export over OTLP/HTTP, in the background.

        Raises:
            ConfigError: the exporter is not installed.
        """
        try:
            exporter = importlib.import_module(_EXPORTER).OTLPSpanExporter(endpoint=endpoint)
        except ModuleNotFoundError:
            raise ConfigError(
                "gateway.trace_endpoint needs an exporter: pip install opentelemetry-sdk "
                "opentelemetry-exporter-otlp-proto-http"
            ) from None
        provider = TracerProvider(resource=Resource.create({"service.name": "baton", "baton.model": model_name}))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()

    def ended(self, stream: Stream, reason: str, now: float) -> None:
        """A choice is over.

        Args:
            reason: stop, length, cancelled or error.
            now: of the event loop's clock, as are the stream's times.
        """
        clock = _Clock(now)
        request, journal = stream.request, stream.journal
        context = self._propagator.extract({"traceparent": stream.traceparent}) if stream.traceparent else None
        root = self._tracer.start_span(
            "request",
            context=context,
            kind=SpanKind.SERVER,
            start_time=clock.ns(stream.arrived_at),
            attributes={
                "baton.request_id": request.request_id,
                "gen_ai.usage.input_tokens": request.num_prompt_tokens,
                "gen_ai.usage.output_tokens": len(journal.token_ids),
                "baton.cached_tokens": stream.cached_tokens,
                "baton.finish_reason": reason,
                "baton.attempts": len(stream.attempts),
            },
        )
        if reason == "error":
            root.set_status(Status(StatusCode.ERROR))
        if stream.first_at:
            root.add_event("first token", timestamp=clock.ns(stream.first_at))
        waited_from = stream.arrived_at
        for attempt in stream.attempts:
            self._span(root, "placement wait", waited_from, attempt.sent_at, clock, attempt, "")
            self._attempt(root, attempt, clock)
            waited_from = attempt.told[-1].at if attempt.told else attempt.sent_at
        root.end(end_time=clock.ns(now))

    def _attempt(self, root: Span, attempt: Attempt, clock: _Clock) -> None:
        """What its workers told: the one that computed the prompt with its first token, each with its last."""
        for told in attempt.told:
            queue_s, before_s, decode_s = told.stage_s
            read_here = told.worker == (attempt.prefill or attempt.decode)
            decoding_at = told.at - decode_s
            began_at = decoding_at - before_s
            if told.is_first or not read_here:
                name = "prefill" if read_here else "transfer"
                span = self._open(root, name, began_at - queue_s, clock, attempt, told.worker)
                self._span(span, "queue", began_at - queue_s, began_at, clock, attempt, told.worker)
                span.end(end_time=clock.ns(decoding_at))
            if told.is_last and told.worker == attempt.decode:
                self._span(root, "decode", decoding_at, told.at, clock, attempt, told.worker)

    def _open(self, parent: Span, name: str, start: float, clock: _Clock, attempt: Attempt, worker: str) -> Span:
        attributes: dict[str, Any] = {"baton.epoch": attempt.epoch}
        if worker:
            attributes["baton.worker"] = worker
        context = trace.set_span_in_context(parent)
        return self._tracer.start_span(name, context=context, start_time=clock.ns(start), attributes=attributes)

    def _span(
        self, parent: Span, name: str, start: float, end: float, clock: _Clock, attempt: Attempt, worker: str
    ) -> None:
        self._open(parent, name, start, clock, attempt, worker).end(end_time=clock.ns(max(end, start)))


class _Clock:
    """From the event loop's seconds to nanoseconds since 1970."""

    def __init__(self, now: float) -> None:
        self._offset_ns = time.time_ns() - int(1e9 * now)

    def ns(self, at: float) -> int:
        return int(1e9 * at) + self._offset_ns
