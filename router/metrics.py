"""What the gateway counts, for Prometheus. Recording costs a list increment; the library only formats."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from router.block_feed import FeedState
from router.block_index import BlockIndex
from router.breaker import BreakerState
from router.registry import WorkerState

CONTENT_TYPE = CONTENT_TYPE_LATEST
TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ITL_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
QUEUE_BOUNDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
DECISION_BOUNDS = (0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.002, 0.005, 0.01, 0.1)
ERROR_BOUNDS = (-1.0, -0.3, -0.1, -0.03, -0.01, -0.003, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
E2E_BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


class Histogram:
    """Counts per bucket."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """For exposition."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """All metrics of one gateway.

    Attributes:
        requests: HTTP requests by (endpoint, status).
        retries: attempts of streams beyond the first, by error code.
        refused: requests that found no room or no worker, by reason.
        placements: by whether the decode worker reads the prompt itself (`local`) or not (`remote`).
        ttft_error: time to the first token of an attempt less what placement predicted.
    """

    def __init__(self) -> None:
        self.ttft = Histogram(TTFT_BOUNDS)
        self.itl = Histogram(ITL_BOUNDS)
        self.e2e = Histogram(E2E_BOUNDS)
        self.queue_wait = Histogram(QUEUE_BOUNDS)
        self.decision = Histogram(DECISION_BOUNDS)
        self.ttft_error = Histogram(ERROR_BOUNDS)
        self.refused: Counter[str] = Counter()
        self.placements: Counter[str] = Counter()
        self.num_waiting = 0
        self.index: BlockIndex | None = None
        self.requests: Counter[tuple[str, int]] = Counter()
        self.retries: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.disconnects = 0
        self.running_streams = 0
        self.workers: Iterable[WorkerState] = ()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def expose(self) -> bytes:
        """Text for the scraper."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the library."""
        yield self.ttft.family("baton_time_to_first_token_seconds", "From arrival to the first token of a choice")
        yield self.itl.family("baton_inter_token_latency_seconds", "Between two chunks of one choice")
        yield self.e2e.family("baton_e2e_request_latency_seconds", "From arrival to the end of a choice")
        yield self.queue_wait.family("baton_queue_wait_seconds", "In the gateway's queue, of requests that waited")
        yield self.decision.family("baton_placement_decision_seconds", "Hashing, matching, costs and reservation")
        yield self.ttft_error.family(
            "baton_ttft_prediction_error_seconds", "First token of an attempt, later (+) or earlier (-) than predicted"
        )
        requests = CounterMetricFamily("baton_requests", "HTTP requests", labels=["endpoint", "status"])
        for (endpoint, status), count in self.requests.items():
            requests.add_metric([endpoint, str(status)], count)
        yield requests
        retries = CounterMetricFamily("baton_retries", "Attempts beyond a stream's first", labels=["reason"])
        for reason, count in self.retries.items():
            retries.add_metric([reason], count)
        yield retries
        yield _counter("baton_refused_requests", "Requests without room or worker", "reason", self.refused)
        yield _counter("baton_placements", "Attempts placed, by who reads the prompt", "kind", self.placements)
        for name, documentation, value in (
            ("baton_prompt_tokens", "Prompt tokens of accepted choices", self.prompt_tokens),
            ("baton_cached_prompt_tokens", "Of these, found in a worker's prefix cache", self.cached_tokens),
            ("baton_generation_tokens", "Generated tokens", self.generated_tokens),
            ("baton_client_disconnects", "Requests whose client went away", self.disconnects),
        ):
            yield CounterMetricFamily(name, documentation, value=value)
        yield GaugeMetricFamily("baton_streams_running", "Choices in progress here", value=self.running_streams)
        yield GaugeMetricFamily("baton_requests_waiting", "Requests in the gateway's queue", value=self.num_waiting)
        if self.index is not None:
            yield GaugeMetricFamily("baton_index_blocks", "Blocks in the global index", value=len(self.index))
            yield GaugeMetricFamily("baton_index_bytes", "Memory of the global index", value=self.index.num_bytes)
        yield from self._worker_gauges()
        yield from self._routing_gauges()

    def _worker_gauges(self) -> Iterator[Metric]:
        fields = {
            "running": ("baton_num_requests_running", "Sequences running on a worker"),
            "waiting": ("baton_num_requests_waiting", "Sequences waiting on a worker"),
            "queued_tokens": ("baton_queued_tokens", "Prompt tokens waiting on a worker"),
            "free_pages": ("baton_free_pages", "Free KV pages of a worker"),
            "preemptions": ("baton_preemptions", "Sequences of a worker that had to give their pages to others"),
            "compiles_after_warmup": ("baton_compiles_after_warmup", "Compiles after warm-up: a bug unless 0"),
        }
        labels = ["worker", "role"]
        workers = list(self.workers)
        connected = GaugeMetricFamily("baton_worker_connected", "1 while connected", labels=labels)
        for worker in workers:
            connected.add_metric([worker.info.worker_id, worker.info.role], float(worker.connected))
        yield connected
        for field, (name, documentation) in fields.items():
            gauge = GaugeMetricFamily(name, documentation, labels=labels)
            for worker in workers:
                if worker.load is not None:
                    gauge.add_metric([worker.info.worker_id, worker.info.role], getattr(worker.load, field))
            yield gauge

    def _routing_gauges(self) -> Iterator[Metric]:
        workers = list(self.workers)
        names = ["worker", "role"]
        live = GaugeMetricFamily("baton_block_feed_live", "1 while a worker's block events are complete", labels=names)
        gaps = CounterMetricFamily("baton_block_feed_gaps", "Times that block events were missing", labels=names)
        fenced = CounterMetricFamily("baton_block_feed_fenced", "Messages of another life, dropped", labels=names)
        closed = GaugeMetricFamily("baton_breaker_closed", "0 while a worker is left alone for failing", labels=names)
        for worker in workers:
            labels = [worker.info.worker_id, worker.info.role]
            closed.add_metric(labels, float(worker.candidate.breaker.state is BreakerState.CLOSED))
            if worker.feed is not None:
                live.add_metric(labels, float(worker.feed.state is FeedState.LIVE))
                gaps.add_metric(labels, worker.feed.num_gaps)
                fenced.add_metric(labels, worker.feed.num_fenced)
        yield from (live, gaps, fenced, closed)


def _counter(name: str, documentation: str, label: str, counts: Counter[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
