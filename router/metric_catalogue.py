"""Every metric that a gateway exposes, declared once: the exposition, docs/metrics.md, boards and rules all read this.

Names follow Prometheus: base units, counters end in `_total` on the wire, ratios are 0 to 1. No label ever holds a
request id, a key or text of a client.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from engine_core.worker_stats import STAGE_BOUNDS

TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ITL_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
E2E_BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
QUEUE_BOUNDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
DECISION_BOUNDS = (0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.002, 0.005, 0.01, 0.1)
ERROR_BOUNDS = (-1.0, -0.3, -0.1, -0.03, -0.01, -0.003, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
TERM_BOUNDS = (0.0, 0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
LAG_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
TOKEN_BOUNDS = (1, 16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Kind(StrEnum):
    """How Prometheus treats it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(StrEnum):
    """Who measures it. Every gateway tells what workers and the fleet told it: queries take the `max` of those."""

    GATEWAY = "gateway"
    WORKER = "worker"
    FLEET = "fleet"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: without the `_total` of counters.
        labels: names.
        help: one line.
        alias: the same under the name that other tools expect; see `GatewayConfig.metric_aliases`.
        bounds: of a histogram.
    """

    name: str
    kind: Kind
    source: Source
    labels: tuple[str, ...]
    help: str
    alias: str
    bounds: tuple[float, ...]

    @property
    def series(self) -> str:
        """Name of the series on the wire; a histogram's are this with _bucket, _sum and _count."""
        return f"{self.name}_total" if self.kind is Kind.COUNTER else self.name


_WORKER = ("worker", "role")
_LINK = ("prefill", "decode")


def _gateway(kind: Kind, name: str, text: str, *labels: str, alias: str = "") -> MetricSpec:
    return MetricSpec(name, kind, Source.GATEWAY, labels, text, alias, ())


def _histogram(name: str, text: str, bounds: tuple[float, ...], alias: str = "") -> MetricSpec:
    return MetricSpec(name, Kind.HISTOGRAM, Source.GATEWAY, (), text, alias, bounds)


def _worker(kind: Kind, name: str, text: str) -> MetricSpec:
    return MetricSpec(name, kind, Source.WORKER, _WORKER, text, "", STAGE_BOUNDS if kind is Kind.HISTOGRAM else ())


def _fleet(kind: Kind, name: str, text: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, kind, Source.FLEET, labels, text, "", ())


def _link(name: str, text: str) -> MetricSpec:
    return MetricSpec(name, Kind.COUNTER, Source.WORKER, _LINK, text, "", ())


SPECS: tuple[MetricSpec, ...] = (
    # What clients feel.
    _histogram(
        "baton_time_to_first_token_seconds",
        "From arrival to the first token of a choice",
        TTFT_BOUNDS,
        "vllm:time_to_first_token_seconds",
    ),
    _histogram(
        "baton_inter_token_latency_seconds",
        "Between two chunks of one choice",
        ITL_BOUNDS,
        "vllm:inter_token_latency_seconds",
    ),
    _histogram(
        "baton_e2e_request_latency_seconds",
        "From arrival to the last token of a choice",
        E2E_BOUNDS,
        "vllm:e2e_request_latency_seconds",
    ),
    _histogram("baton_request_prompt_tokens", "Prompt tokens of a choice", TOKEN_BOUNDS, "vllm:request_prompt_tokens"),
    _histogram(
        "baton_request_generation_tokens",
        "Generated tokens of a choice that ended",
        TOKEN_BOUNDS,
        "vllm:request_generation_tokens",
    ),
    _gateway(Kind.COUNTER, "baton_requests", "HTTP requests that were answered", "endpoint", "status"),
    _gateway(
        Kind.COUNTER,
        "baton_choices",
        "Choices that ended: stop, length, cancelled by the client, or error",
        "finish_reason",
        alias="vllm:request_success",
    ),
    _gateway(
        Kind.COUNTER,
        "baton_choices_within_slo",
        "Of the choices that ended by stop or length, those within both objectives: the numerator of goodput",
    ),
    _gateway(
        Kind.GAUGE,
        "baton_slo_seconds",
        "The objectives: ttft, and itl (the mean of a choice)",
        "objective",
    ),
    _gateway(Kind.GAUGE, "baton_streams_running", "Choices in progress in this gateway"),
    _gateway(Kind.COUNTER, "baton_prompt_tokens", "Prompt tokens of accepted choices", alias="vllm:prompt_tokens"),
    _gateway(
        Kind.COUNTER,
        "baton_cached_prompt_tokens",
        "Of these, found in a prefix cache",
        alias="vllm:prompt_tokens_cached",
    ),
    _gateway(Kind.COUNTER, "baton_generation_tokens", "Generated tokens", alias="vllm:generation_tokens"),
    _gateway(Kind.COUNTER, "baton_client_disconnects", "Requests whose client went away"),
    # What the gateway does.
    _gateway(Kind.COUNTER, "baton_retries", "Attempts beyond a stream's first, by the error before", "reason"),
    _gateway(
        Kind.COUNTER,
        "baton_placements",
        "Attempts by pair; prefill is `local` where the decode worker reads the prompt",
        *_LINK,
    ),
    _gateway(Kind.COUNTER, "baton_fetches", "Attempts whose prefill worker was to fetch leading blocks from a donor"),
    _gateway(Kind.COUNTER, "baton_refused_requests", "Requests that found no room or no worker", "reason"),
    _gateway(Kind.GAUGE, "baton_requests_waiting", "Requests in the gateway's queue"),
    _histogram("baton_queue_wait_seconds", "In the gateway's queue, of requests that waited", QUEUE_BOUNDS),
    _histogram("baton_placement_decision_seconds", "Hashing, matching, costs and reservation", DECISION_BOUNDS),
    MetricSpec(
        "baton_placement_term_seconds",
        Kind.HISTOGRAM,
        Source.GATEWAY,
        ("term",),
        "What the chosen pair was predicted to cost, by term as in `baton explain`; of affinity, what it saved",
        "",
        TERM_BOUNDS,
    ),
    _histogram(
        "baton_ttft_prediction_error_seconds",
        "First token of an attempt, later (+) or earlier (-) than predicted",
        ERROR_BOUNDS,
    ),
    _gateway(Kind.GAUGE, "baton_index_blocks", "Blocks in the global index"),
    _gateway(Kind.GAUGE, "baton_index_bytes", "Memory of the global index"),
    _gateway(
        Kind.GAUGE,
        "baton_index_staleness_seconds",
        "For how long the global index has lacked block events of a worker; 0 while it has all",
        *_WORKER,
    ),
    _gateway(Kind.GAUGE, "baton_block_feed_live", "1 while a worker's block events are complete", *_WORKER),
    _gateway(Kind.COUNTER, "baton_block_feed_gaps", "Times that block events of a worker were missing", *_WORKER),
    _gateway(Kind.COUNTER, "baton_block_feed_fenced", "Messages of another life of a worker, dropped", *_WORKER),
    _gateway(Kind.GAUGE, "baton_breaker_closed", "0 while a worker is left alone for failing", *_WORKER),
    _histogram("baton_event_loop_lag_seconds", "How late the gateway's event loop wakes up", LAG_BOUNDS),
    _gateway(Kind.GAUGE, "baton_build_info", "1; what runs", "version", "model"),
    # Workers.
    _worker(Kind.GAUGE, "baton_worker_connected", "1 while the gateway is connected to the worker"),
    _worker(Kind.GAUGE, "baton_worker_suspect", "1 while the worker is silent for longer than it should be"),
    _worker(Kind.GAUGE, "baton_worker_incarnation", "Which life of the worker this is; it grows by one per death"),
    _worker(Kind.GAUGE, "baton_num_requests_running", "Sequences running on a worker"),
    _worker(Kind.GAUGE, "baton_num_requests_waiting", "Sequences waiting on a worker"),
    _worker(Kind.GAUGE, "baton_queued_tokens", "Prompt tokens still to be computed by a worker"),
    _worker(Kind.GAUGE, "baton_free_pages", "KV pages of a worker that can be had, free or evictable"),
    _worker(Kind.GAUGE, "baton_pages", "KV pages of a worker"),
    _worker(Kind.GAUGE, "baton_slots", "Rows of a worker's decode batch"),
    _worker(Kind.GAUGE, "baton_kv_usage_ratio", "Share of a worker's KV pages held by sequences"),
    _worker(Kind.COUNTER, "baton_preemptions", "Sequences of a worker that had to give their pages to others"),
    _worker(Kind.GAUGE, "baton_compiles_after_warmup", "Compilations after warm-up: a bug unless 0"),
    _worker(Kind.HISTOGRAM, "baton_queue_seconds", "From a sequence's arrival at a worker to its admission"),
    _worker(Kind.HISTOGRAM, "baton_prefill_seconds", "From admission to the first token, where it is computed"),
    _worker(Kind.HISTOGRAM, "baton_transfer_seconds", "From the ticket to the last verified KV block, per hand-over"),
    _worker(Kind.HISTOGRAM, "baton_decode_seconds", "From the first token (or the slot) of a sequence to its last"),
    _worker(Kind.COUNTER, "baton_prefill_steps", "Prefill steps"),
    _worker(Kind.COUNTER, "baton_prefill_step_tokens", "Prompt tokens computed in them"),
    _worker(Kind.COUNTER, "baton_prefill_padding_tokens", "Token rows that only padded them to their buckets"),
    _worker(Kind.COUNTER, "baton_decode_steps", "Decode steps"),
    _worker(Kind.COUNTER, "baton_decode_step_rows", "Sequences advanced in them"),
    _worker(Kind.COUNTER, "baton_decode_padding_rows", "Rows that only padded them to their buckets"),
    _worker(Kind.COUNTER, "baton_prefix_query_tokens", "Tokens looked up in a worker's prefix cache"),
    _worker(Kind.COUNTER, "baton_prefix_hit_tokens", "Of these, found"),
    _worker(Kind.COUNTER, "baton_engine_busy_seconds", "Time that a worker's engine thread was at work"),
    _worker(Kind.GAUGE, "baton_worker_event_loop_lag_seconds", "Longest delay of a worker's event loop lately"),
    _worker(
        Kind.GAUGE,
        "baton_device_memory_used_bytes",
        "Memory in use on a worker's devices (HBM); where they are CPUs, its process's resident memory",
    ),
    _worker(Kind.GAUGE, "baton_device_memory_limit_bytes", "Memory there is on a worker's devices"),
    MetricSpec(
        "baton_refused_connections",
        Kind.COUNTER,
        Source.WORKER,
        (*_WORKER, "reason"),
        "Connections that a worker ended: wrong secret, version or fingerprint, damaged or hostile frames",
        "",
        (),
    ),
    # KV hand-over by pair.
    _link("baton_transfers", "Complete KV hand-overs"),
    _link("baton_transfer_failures", "KV hand-overs that failed; the request was placed again"),
    _link("baton_transfer_bytes", "KV bytes received and verified"),
    _link("baton_transfer_link_seconds", "Seconds of the complete hand-overs together"),
    # The fleet and its autoscaler.
    _fleet(Kind.GAUGE, "baton_fleet_wanted_workers", "Workers that there should be", "role"),
    _fleet(
        Kind.GAUGE,
        "baton_fleet_workers",
        "Workers by state: pending (no node has room yet), starting, ready, draining, waiting (for a next life)",
        "role",
        "state",
    ),
    _fleet(Kind.GAUGE, "baton_autoscale_target_workers", "Workers that the autoscaler wants, or would want", "role"),
    _fleet(
        Kind.COUNTER,
        "baton_autoscale_changes",
        "Changes of a pool that the autoscaler decided, or advised: up, down or flip, and why",
        "role",
        "direction",
        "cause",
    ),
)

BY_NAME = {spec.name: spec for spec in SPECS}

AGGREGATES: dict[str, str] = {
    "vllm:num_requests_running": "Sequences in decode batches, all workers",
    "vllm:num_requests_waiting": "Sequences that wait, all workers",
    "vllm:kv_cache_usage_perc": "Share of the decode workers' KV pages in use, 0 to 1",
    "vllm:prefix_cache_queries": "Tokens looked up in prefix caches, all workers",
    "vllm:prefix_cache_hits": "Of these, found",
    "vllm:num_preemptions": "Sequences that had to give their pages to others, all workers",
}
"""Further names for other tools, each with the label `model_name`; the first three are what the Gateway API inference
extension asks of a model server."""
