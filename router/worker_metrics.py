"""What workers told a gateway, as Prometheus families; and the sums over all workers that other tools expect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from engine_core.errors import LayoutMismatch, ProtocolError, WrongProtocol, WrongSecret
from engine_core.messages import Distribution
from engine_core.types import Role
from engine_core.worker_stats import STAGE_BOUNDS
from router.metric_catalogue import AGGREGATES, BY_NAME, Kind, Source
from router.registry import WorkerState

LOADS = {
    "baton_num_requests_running": "running",
    "baton_num_requests_waiting": "waiting",
    "baton_queued_tokens": "queued_tokens",
    "baton_free_pages": "free_pages",
    "baton_preemptions": "preemptions",
    "baton_compiles_after_warmup": "compiles_after_warmup",
}
NO_REFUSALS = {kind.code: 0 for kind in (ProtocolError, WrongSecret, WrongProtocol, LayoutMismatch)}
STAGES = {
    "baton_queue_seconds": "queue",
    "baton_prefill_seconds": "prefill",
    "baton_transfer_seconds": "transfer",
    "baton_decode_seconds": "decode",
}
STATS = {
    "baton_prefill_steps": "prefill_steps",
    "baton_prefill_step_tokens": "prefill_tokens",
    "baton_prefill_padding_tokens": "prefill_padding",
    "baton_decode_steps": "decode_steps",
    "baton_decode_step_rows": "decode_rows",
    "baton_decode_padding_rows": "decode_padding",
    "baton_prefix_query_tokens": "query_tokens",
    "baton_prefix_hit_tokens": "hit_tokens",
    "baton_engine_busy_seconds": "busy_s",
    "baton_worker_event_loop_lag_seconds": "loop_lag_s",
    "baton_device_memory_used_bytes": "memory_used_bytes",
    "baton_device_memory_limit_bytes": "memory_limit_bytes",
}
LINKS = {
    "baton_transfers": "transfers",
    "baton_transfer_failures": "failures",
    "baton_transfer_bytes": "num_bytes",
    "baton_transfer_link_seconds": "seconds",
}

Simple = CounterMetricFamily | GaugeMetricFamily


def simple_family(name: str) -> Simple:
    """An empty counter or gauge of the catalogue."""
    spec = BY_NAME[name]
    kind = CounterMetricFamily if spec.kind is Kind.COUNTER else GaugeMetricFamily
    return kind(name, spec.help, labels=spec.labels)


def latest_lives(workers: Iterable[WorkerState]) -> list[WorkerState]:
    """One per worker id: while an earlier life still finishes its requests, only the later one is told about."""
    latest: dict[str, WorkerState] = {}
    for worker in workers:
        known = latest.get(worker.info.worker_id)
        if known is None or known.info.incarnation < worker.info.incarnation:
            latest[worker.info.worker_id] = worker
    return list(latest.values())


def kv_usage(worker: WorkerState) -> float:
    """Share of its pages that sequences hold."""
    if worker.load is None or not worker.info.num_pages:
        return 0.0
    return 1 - worker.load.free_pages / worker.info.num_pages


def link_names(workers: Iterable[WorkerState]) -> dict[str, str]:
    """KV address -> worker id of each worker that hands KV over: links are told by address."""
    return {worker.info.address.kv_name: worker.info.worker_id for worker in workers if worker.info.address.kv_port}


def worker_families(workers: Iterable[WorkerState]) -> Iterator[Metric]:
    """Everything whose source is a worker."""
    alive = latest_lives(workers)
    families: dict[str, Metric] = {
        spec.name: simple_family(spec.name)
        for spec in BY_NAME.values()
        if spec.source is Source.WORKER and spec.kind is not Kind.HISTOGRAM
    }
    stages = {name: HistogramMetricFamily(name, BY_NAME[name].help, labels=BY_NAME[name].labels) for name in STAGES}
    names = link_names(alive)
    for worker in alive:
        labels = [worker.info.worker_id, str(worker.info.role)]
        for name, value in _values(worker).items():
            families[name].add_metric(labels, value)  # type: ignore[attr-defined]  # all are simple
        if worker.stats is None:
            continue
        for name, field in STAGES.items():
            distribution: Distribution = getattr(worker.stats, field)
            stages[name].add_metric(labels, stage_buckets(distribution), distribution.total_s)
        for reason, count in (NO_REFUSALS | worker.stats.refused).items():
            families["baton_refused_connections"].add_metric([*labels, reason], count)  # type: ignore[attr-defined]
        for source, link in worker.stats.links.items():
            for name, field in LINKS.items():
                pair = [names.get(source, source), worker.info.worker_id]
                families[name].add_metric(pair, getattr(link, field))  # type: ignore[attr-defined]
    yield from families.values()
    yield from stages.values()


def _values(worker: WorkerState) -> Mapping[str, float]:
    """Name -> value of what is one number per worker. A worker that is not connected has few."""
    info = worker.info
    values: dict[str, float] = {
        "baton_worker_connected": worker.connected,
        "baton_worker_suspect": worker.candidate.suspect,
        "baton_worker_incarnation": info.incarnation,
        "baton_pages": info.num_pages,
        "baton_slots": info.num_slots,
    }
    if worker.load is not None:
        values |= {name: getattr(worker.load, field) for name, field in LOADS.items()}
        values["baton_kv_usage_ratio"] = kv_usage(worker)
    if worker.stats is not None:
        values |= {name: getattr(worker.stats, field) for name, field in STATS.items()}
    return values


def stage_buckets(distribution: Distribution) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    bounds = (*map(str, STAGE_BOUNDS), "+Inf")
    return list(zip(bounds, map(float, accumulate(distribution.counts)), strict=True))


def aggregate_families(workers: Iterable[WorkerState], model: str) -> Iterator[Metric]:
    """The sums over all workers."""
    alive = latest_lives(workers)
    loads = [worker.load for worker in alive if worker.load is not None]
    decode_usage = [kv_usage(w) for w in alive if w.load is not None and w.info.role is Role.DECODE]
    stats = [worker.stats for worker in alive if worker.stats is not None]
    gauges = {
        "vllm:num_requests_running": sum(load.running for load in loads),
        "vllm:num_requests_waiting": sum(load.waiting for load in loads),
        "vllm:kv_cache_usage_perc": sum(decode_usage) / len(decode_usage) if decode_usage else 0.0,
    }
    counters = {
        "vllm:prefix_cache_queries": sum(one.query_tokens for one in stats),
        "vllm:prefix_cache_hits": sum(one.hit_tokens for one in stats),
        "vllm:num_preemptions": sum(load.preemptions for load in loads),
    }
    for name, value in gauges.items():
        gauge = GaugeMetricFamily(name, AGGREGATES[name], labels=["model_name"])
        gauge.add_metric([model], value)
        yield gauge
    for name, value in counters.items():
        counter = CounterMetricFamily(name, AGGREGATES[name], labels=["model_name"])
        counter.add_metric([model], value)
        yield counter
