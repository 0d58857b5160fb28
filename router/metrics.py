"""What the gateway counts, for Prometheus. Recording costs a list increment; the library only formats."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import msgspec
import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from engine_core.errors import BatonError, CapacityError
from router.block_feed import FeedState
from router.block_index import BlockIndex
from router.breaker import BreakerState
from router.config import GatewayConfig
from router.decision import Terms
from router.fleet_metrics import fleet_families
from router.fleet_view import FleetView
from router.metric_catalogue import BY_NAME, MetricSpec
from router.registry import WorkerState
from router.stream import Stream
from router.worker_metrics import aggregate_families, latest_lives, simple_family, worker_families

CONTENT_TYPE = CONTENT_TYPE_LATEST
LOCAL = "local"  # in place of a prefill worker's name


class Histogram:
    """Counts per bucket of a metric of the catalogue.

    Values are noted one by one, and sorted into buckets many at a time: when somebody reads the counts, and ten times a
    second (`Metrics.beat`).

    Args:
        name: of the metric.

    Attributes:
        observe: notes one value.
    """

    __slots__ = ("_bounds", "_counts", "_noted", "_spec", "_sum", "observe")

    def __init__(self, name: str) -> None:
        self._spec = BY_NAME[name]
        self._bounds = self._spec.bounds
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._noted: list[float] = []
        self.observe: Callable[[float], None] = self._noted.append

    def fold(self) -> None:
        """Count what was noted."""
        if self._noted:
            values = np.array(self._noted)
            self._noted.clear()
            self.observe_all(values)

    def observe_all(self, values: npt.NDArray[np.float64]) -> None:
        """Count many values."""
        places = np.searchsorted(self._bounds, values)
        counts = np.bincount(places, minlength=len(self._counts)).tolist()
        self._counts = [known + new for known, new in zip(self._counts, counts, strict=True)]
        self._sum += float(values.sum())

    @property
    def bounds(self) -> tuple[float, ...]:
        """Upper ends of all buckets but the last."""
        return self._bounds

    @property
    def counts(self) -> list[int]:
        """Values per bucket so far; the last bucket has no bound."""
        self.fold()
        return list(self._counts)

    @property
    def sum(self) -> float:
        """Of all values."""
        self.fold()
        return self._sum

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Upper ends, and how many values are not above each."""
        labels = (*map(str, self._bounds), "+Inf")
        return list(zip(labels, map(float, accumulate(self.counts)), strict=True))

    def families(self, extra: dict[str, str]) -> Iterator[HistogramMetricFamily]:
        """For exposition: under its name and, with the labels `extra`, under its alias where `extra` is not empty."""
        buckets = self.buckets
        yield HistogramMetricFamily(self._spec.name, self._spec.help, buckets=buckets, sum_value=self._sum)
        if extra and self._spec.alias:
            family = HistogramMetricFamily(self._spec.alias, self._spec.help, labels=list(extra))
            family.add_metric(list(extra.values()), buckets, self._sum)
            yield family


class TermHistograms:
    """One histogram for each term of a placement's cost.

    Attributes:
        observe: notes the terms of a chosen pair. A sum that fell would look like a restart: affinity has its sign off.
    """

    __slots__ = ("_noted", "_of_term", "_spec", "observe")

    def __init__(self) -> None:
        self._spec = BY_NAME["baton_placement_term_seconds"]
        self._of_term = {name: Histogram(self._spec.name) for name in Terms.__struct_fields__}
        self._noted: list[Terms] = []
        self.observe: Callable[[Terms], None] = self._noted.append

    def fold(self) -> None:
        """Count what was noted."""
        if self._noted:
            values = np.abs([msgspec.structs.astuple(terms) for terms in self._noted])
            self._noted.clear()
            for histogram, of_term in zip(self._of_term.values(), values.T, strict=True):
                histogram.observe_all(of_term)

    def family(self) -> HistogramMetricFamily:
        """For exposition."""
        self.fold()
        family = HistogramMetricFamily(self._spec.name, self._spec.help, labels=self._spec.labels)
        for name, histogram in self._of_term.items():
            family.add_metric([name.removesuffix("_s")], histogram.buckets, histogram.sum)
        return family


class Metrics(Collector):
    """All metrics of one gateway.

    Args:
        config: names the model, the objectives, and whether other tools' names are wanted.
        version: of the software.

    Attributes:
        requests: HTTP requests by (endpoint, status).
        retries: attempts of streams beyond the first, by error code.
        choices: by finish reason.
        refused: requests that found no room or no worker, by reason.
        terms: of the pairs chosen.
        placements: attempts by (prefill worker or LOCAL, decode worker).
        fetches: attempts with a donor.
        ttft_error: time to the first token of an attempt less what placement predicted.
    """

    def __init__(self, config: GatewayConfig, version: str) -> None:
        self.ttft = Histogram("baton_time_to_first_token_seconds")
        self.itl = Histogram("baton_inter_token_latency_seconds")
        self.e2e = Histogram("baton_e2e_request_latency_seconds")
        self.queue_wait = Histogram("baton_queue_wait_seconds")
        self.decision = Histogram("baton_placement_decision_seconds")
        self.terms = TermHistograms()
        self.ttft_error = Histogram("baton_ttft_prediction_error_seconds")
        self.loop_lag = Histogram("baton_event_loop_lag_seconds")
        self._prompt_lengths = Histogram("baton_request_prompt_tokens")
        self._answer_lengths = Histogram("baton_request_generation_tokens")
        self.refused: Counter[str] = Counter(dict.fromkeys(_refusals(CapacityError), 0))
        self.num_waiting = 0
        self.index: BlockIndex | None = None
        self.fleet: FleetView | None = None
        self.requests: Counter[tuple[str, int]] = Counter()
        self.retries: Counter[str] = Counter(dict.fromkeys(_retryable_codes(BatonError), 0))
        self.choices: Counter[str] = Counter({"stop": 0, "length": 0, "cancelled": 0, "error": 0})
        self.placements: Counter[tuple[str, str]] = Counter()
        self.fetches = 0
        self.within_slo = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.disconnects = 0
        self.running_streams = 0
        self.workers: Iterable[WorkerState] = ()
        self._config = config
        self._version = version
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def accepted(self, num_prompt_tokens: int) -> None:
        """A choice was placed for the first time."""
        self.prompt_tokens += num_prompt_tokens
        self._prompt_lengths.observe(num_prompt_tokens)

    def placed(self, prefill: str | None, decode: str, *, fetches: bool) -> None:
        """An attempt begins there."""
        self.placements[prefill or LOCAL, decode] += 1
        self.fetches += fetches

    def ended(self, stream: Stream, reason: str) -> None:
        """A choice is over. `reason`: stop, length, cancelled or error."""
        self.choices[reason] += 1
        if stream.last_at:
            self.e2e.observe(stream.last_at - stream.arrived_at)
        self._answer_lengths.observe(len(stream.journal.token_ids))
        self.within_slo += reason in ("stop", "length") and self._is_within_slo(stream)

    def beat(self, lag_s: float) -> None:
        """The event loop woke up so late. To be called often: it counts what was noted, while that is little."""
        self.loop_lag.observe(lag_s)
        for histogram in self._histograms():
            histogram.fold()
        self.terms.fold()

    def expose(self) -> bytes:
        """Text for the scraper."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the library."""
        model = {"model_name": self._config.model_name} if self._config.metric_aliases else {}
        for histogram in self._histograms():
            yield from histogram.families(model)
        yield self.terms.family()
        yield from self._counters(model)
        yield from self._gauges()
        yield from self._routing_gauges()
        yield from worker_families(self.workers)
        if self.fleet is not None:
            yield from fleet_families(self.fleet)
        if model:
            yield from aggregate_families(self.workers, self._config.model_name)

    def _histograms(self) -> tuple[Histogram, ...]:
        lengths = (self._prompt_lengths, self._answer_lengths)
        routing = (self.queue_wait, self.decision, self.ttft_error)
        return (self.ttft, self.itl, self.e2e, *lengths, *routing, self.loop_lag)

    def _is_within_slo(self, stream: Stream) -> bool:
        if not stream.first_at:
            return False
        intervals = max(len(stream.journal.token_ids) - 1, 1)
        mean_itl_s = (stream.last_at - stream.first_at) / intervals
        is_soon = stream.first_at - stream.arrived_at <= self._config.slo_ttft_s
        return is_soon and mean_itl_s <= self._config.slo_itl_s

    def _counters(self, model: dict[str, str]) -> Iterator[Metric]:
        labelled: dict[str, dict[tuple[str, ...], int]] = {
            "baton_requests": {(endpoint, str(status)): count for (endpoint, status), count in self.requests.items()},
            "baton_retries": {(reason,): count for reason, count in self.retries.items()},
            "baton_choices": {(reason,): count for reason, count in self.choices.items()},
            "baton_refused_requests": {(reason,): count for reason, count in self.refused.items()},
            "baton_placements": {(prefill, decode): count for (prefill, decode), count in self.placements.items()},
            "baton_fetches": {(): self.fetches},
            "baton_choices_within_slo": {(): self.within_slo},
            "baton_prompt_tokens": {(): self.prompt_tokens},
            "baton_cached_prompt_tokens": {(): self.cached_tokens},
            "baton_generation_tokens": {(): self.generated_tokens},
            "baton_client_disconnects": {(): self.disconnects},
        }
        for name, samples in labelled.items():
            spec = BY_NAME[name]
            yield _counter(name, spec, {}, samples)
            if model and spec.alias:
                yield _counter(spec.alias, spec, model, samples)

    def _gauges(self) -> Iterator[Metric]:
        slo = simple_family("baton_slo_seconds")
        slo.add_metric(["ttft"], self._config.slo_ttft_s)
        slo.add_metric(["itl"], self._config.slo_itl_s)
        running = simple_family("baton_streams_running")
        running.add_metric([], self.running_streams)
        build: GaugeMetricFamily | CounterMetricFamily = simple_family("baton_build_info")
        build.add_metric([self._version, self._config.model_name], 1)
        waiting = simple_family("baton_requests_waiting")
        waiting.add_metric([], self.num_waiting)
        yield from (slo, running, waiting, build)
        if self.index is not None:
            blocks, held = simple_family("baton_index_blocks"), simple_family("baton_index_bytes")
            blocks.add_metric([], len(self.index))
            held.add_metric([], self.index.num_bytes)
            yield from (blocks, held)

    def _routing_gauges(self) -> Iterator[Metric]:
        live, gaps = simple_family("baton_block_feed_live"), simple_family("baton_block_feed_gaps")
        fenced, closed = simple_family("baton_block_feed_fenced"), simple_family("baton_breaker_closed")
        stale = simple_family("baton_index_staleness_seconds")
        for worker in latest_lives(self.workers):
            labels = [worker.info.worker_id, worker.info.role]
            closed.add_metric(labels, float(worker.candidate.breaker.state is BreakerState.CLOSED))
            if worker.feed is not None:
                live.add_metric(labels, float(worker.feed.state is FeedState.LIVE))
                gaps.add_metric(labels, worker.feed.num_gaps)
                fenced.add_metric(labels, worker.feed.num_fenced)
                stale.add_metric(labels, worker.feed.stale_s(time.monotonic()))  # the event loop's clock
        yield from (live, gaps, fenced, stale, closed)


def _retryable_codes(kind: type[BatonError]) -> set[str]:
    """Of this error and its subclasses: a series that appears only with the first error hides that error's rate."""
    codes = {kind.code} if kind.retryable else set()
    return codes.union(*(_retryable_codes(child) for child in kind.__subclasses__()))


def _refusals(kind: type[CapacityError]) -> set[str]:
    """Reasons of this error and its subclasses."""
    return {kind.reason}.union(*(_refusals(child) for child in kind.__subclasses__()))


def _counter(
    name: str, spec: MetricSpec, extra: dict[str, str], samples: dict[tuple[str, ...], int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, spec.help, labels=[*spec.labels, *extra])
    for labels, count in samples.items():
        family.add_metric([*labels, *extra.values()], count)
    return family
