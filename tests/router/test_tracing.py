"""The span tree of a request: by hand from what workers tell, over HTTP, and from real workers in test_routing."""

from __future__ import annotations

import sys

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine_core.errors import ConfigError
from engine_core.messages import TokenChunk
from engine_core.types import FinishReason, Request, SamplingParams
from router.decision import Terms
from router.mailbox import Mailbox
from router.stream import Route, Stage, Stream
from router.tracing import Tracing
from tests.router.conftest import Cluster

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def tracing() -> tuple[Tracing, InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider), exporter


def tree(spans: tuple[ReadableSpan, ...]) -> dict[str, str]:
    """Name of each span with its parent's; a span lies within its parent, but for rounding."""
    by_id = {span.context.span_id: span for span in spans}
    found = {}
    for span in spans:
        parent = by_id.get(span.parent.span_id) if span.parent is not None else None
        found[f"{span.name} of {span.attributes.get('baton.worker', 'gateway')}"] = parent.name if parent else ""
        if parent is not None:
            assert parent.start_time - 1e6 <= span.start_time <= span.end_time <= parent.end_time + 1e6, span.name
    return found


def chunk(position: int, stage_s: tuple[float, ...], finish: FinishReason | None = None) -> TokenChunk:
    return TokenChunk("r", 0, position, [5], finish, stage_s=stage_s)


def finished_stream(prefill: str | None) -> Stream:
    request = Request("r", [1, 2, 3], 3, SamplingParams(max_tokens=2))
    stream = Stream(request, 0, Mailbox(None), 100.0, None)  # type: ignore[arg-type]  # nobody reads it
    stream.route = Route(prefill, "d", None, Terms(*[0.0] * 8))
    stream.sent_at = 100.1
    stream.begin_attempt()
    stream.heard_stages(chunk(0, (0.1, 0.3, 0.0)), 100.6)
    stream.first_at = 100.6
    stream.stage = Stage.DECODING
    stream.heard_stages(chunk(1, (0.1, 0.2, 0.4) if prefill else (0.1, 0.3, 0.4), FinishReason.LENGTH), 101.0)
    return stream


def test_disaggregated() -> None:
    traces, exporter = tracing()
    traces.ended(finished_stream("p"), "length", 101.0)
    spans = exporter.get_finished_spans()
    assert tree(spans) == {
        "request of gateway": "",
        "placement wait of gateway": "request",
        "prefill of p": "request",
        "queue of p": "prefill",
        "transfer of d": "request",
        "queue of d": "transfer",
        "decode of d": "request",
    }
    seconds = {f"{s.name} {s.attributes.get('baton.worker', '')}": (s.end_time - s.start_time) / 1e9 for s in spans}
    assert seconds["request "] == pytest.approx(1.0) and seconds["placement wait "] == pytest.approx(0.1)
    assert seconds["prefill p"] == pytest.approx(0.4) and seconds["transfer d"] == pytest.approx(0.3)
    assert seconds["decode d"] == pytest.approx(0.4)


def test_read_by_the_decode_worker() -> None:
    traces, exporter = tracing()
    traces.ended(finished_stream(None), "length", 101.0)
    assert set(tree(exporter.get_finished_spans())) == {
        "request of gateway",
        "placement wait of gateway",
        "prefill of d",
        "queue of d",
        "decode of d",
    }


async def test_over_http_it_joins_the_clients_trace_and_tells_of_errors(cluster: Cluster) -> None:
    cluster.service.tracing, exporter = tracing()
    body = {"model": "demo", "prompt": "Once", "max_tokens": 2}
    reply = await cluster.http.post("/v1/completions", json=body, headers={"traceparent": PARENT})
    assert reply.status_code == 200
    root = next(span for span in exporter.get_finished_spans() if span.name == "request")
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert root.attributes["baton.finish_reason"] == "length" and root.attributes["gen_ai.usage.output_tokens"] == 2
    exporter.clear()
    for worker in (*cluster.prefill, *cluster.decode):
        worker.fail, worker.fail_retryable = 1, False
    assert (await cluster.http.post("/v1/completions", json=body)).status_code >= 500
    root = next(span for span in exporter.get_finished_spans() if span.name == "request")
    assert root.status.status_code.name == "ERROR" and root.parent is None


async def test_off_by_default_nothing_is_kept(cluster: Cluster) -> None:
    assert cluster.service.tracing is None
    kept: list[Stream] = []
    end = cluster.service._end
    cluster.service._end = lambda stream, reason: (kept.append(stream), end(stream, reason))
    await cluster.client.completions.create(model="demo", prompt="Once", max_tokens=2)
    assert [stream.attempts for stream in kept] == [[]]


def test_without_an_exporter_the_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"gateway\.trace_endpoint needs an exporter: pip install opentelemetry-"):
        Tracing.to("http://127.0.0.1:1/v1/traces", "demo")
