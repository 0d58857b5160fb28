"""Recording rules and alerts, as data; `files` turns them into what Prometheus reads.

Burn-rate alerts follow the multi-window scheme of the Google SRE workbook, chapter 5: a fast one (14.4 times the
budget over 1 h, still going on in the last 5 min) pages, a slow one (6 times over 6 h and 30 min) asks for a look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.monitoring.promql import (
    RULE,
    attainment,
    error_ratio,
    gauge,
    increase,
    padding,
    pool_gauge,
    quantile,
    rate,
    ratio,
)

OBJECTIVE = 0.99  # share of choices within the latency objectives; the rest is the error budget
WORKER = ("worker", "role")
LINK = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Recording:
    """A series that Prometheus computes at every evaluation."""

    record: str
    expr: str


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert: `query` returns data as long as anything is scraped, and fires where `condition` holds.

    Attributes:
        name: also its heading in docs/runbook.md.
        condition: PromQL behind the query, such as "> 0.1".
        lasting: for how long it must hold.
        severity: page (somebody acts now) or ticket.
        summary: one line; Prometheus fills in the labels.
    """

    name: str
    query: str
    condition: str
    lasting: str
    severity: str
    summary: str

    @property
    def expr(self) -> str:
        """What Prometheus evaluates."""
        return f"({self.query}) {self.condition}"


def _burning(long: str, short: str, factor: float) -> str:
    """Share of the budget burnt, as a multiple, over the shorter window where the longer one agrees."""
    budget = 1 - OBJECTIVE
    burn_long = f"(1 - job:baton_slo_attainment:ratio_{long}) / {budget:g}"
    burn_short = f"(1 - job:baton_slo_attainment:ratio_{short}) / {budget:g}"
    return f"({burn_short}) * ({burn_long} > bool {factor:g})"


RECORDINGS: tuple[Recording, ...] = (
    *(
        Recording(f"job:baton_slo_attainment:ratio_{window}", attainment(RULE.wide(window)))
        for window in ("5m", "30m", "1h", "6h")
    ),
    *(
        Recording(f"job:baton_{short}_seconds:p{share * 100:g}_5m", quantile(RULE, share, name, ()))
        for short, name in (
            ("ttft", "baton_time_to_first_token_seconds"),
            ("itl", "baton_inter_token_latency_seconds"),
        )
        for share in (0.5, 0.99)
    ),
    Recording("job:baton_errors:ratio_5m", error_ratio(RULE)),
    Recording("job:baton_requests:rate_5m", rate(RULE, "baton_requests", ())),
    Recording("job:baton_goodput:rate_5m", rate(RULE, "baton_choices_within_slo", ())),
    Recording("job:baton_generation_tokens:rate_5m", rate(RULE, "baton_generation_tokens", ())),
    Recording("job_role:baton_workers:connected", pool_gauge(RULE, "baton_worker_connected", ("role",))),
    Recording(
        "worker:baton_prefix_hits:ratio_5m",
        ratio(rate(RULE, "baton_prefix_hit_tokens", WORKER), rate(RULE, "baton_prefix_query_tokens", WORKER)),
    ),
    Recording(
        "worker:baton_prefill_padding:ratio_5m",
        padding(RULE, "baton_prefill_step_tokens", "baton_prefill_padding_tokens"),
    ),
    Recording(
        "worker:baton_decode_padding:ratio_5m", padding(RULE, "baton_decode_step_rows", "baton_decode_padding_rows")
    ),
    Recording("worker:baton_engine_busy:ratio_5m", rate(RULE, "baton_engine_busy_seconds", WORKER)),
    Recording("link:baton_transfer_bytes:rate_5m", rate(RULE, "baton_transfer_bytes", LINK)),
    Recording(
        "link:baton_transfer_speed:bytes_per_second_5m",
        ratio(rate(RULE, "baton_transfer_bytes", LINK), rate(RULE, "baton_transfer_link_seconds", LINK)),
    ),
)

ALERTS: tuple[Alert, ...] = (
    Alert(
        "BatonGatewayDown",
        'up{job="baton"}',
        "== 0",
        "1m",
        "page",
        "The gateway at {{ $labels.instance }} cannot be scraped.",
    ),
    Alert(
        "BatonNoDecodeWorker",
        'sum by (job) (job_role:baton_workers:connected{role="decode"}) or max by (job) (0 * up{job="baton"})',
        "== 0",
        "30s",
        "page",
        "No decode worker is connected: every request waits, then fails with 503.",
    ),
    Alert(
        "BatonNoPrefillWorker",
        'job_role:baton_workers:connected{role="prefill"}',
        "== 0",
        "1m",
        "page",
        "Prefill workers are known and none is connected: decode workers read all prompts.",
    ),
    Alert(
        "BatonWorkerDisconnected",
        gauge(RULE, "baton_worker_connected", WORKER),
        "== 0",
        "2m",
        "ticket",
        "{{ $labels.worker }} is a member of the fleet and no gateway is connected to it.",
    ),
    Alert(
        "BatonWorkerWithoutNode",
        gauge(RULE, "baton_fleet_workers", ("role",), 'state="pending"'),
        "> 0",
        "15m",
        "ticket",
        "{{ $value }} {{ $labels.role }} workers have had no node for 15 minutes.",
    ),
    Alert(
        "BatonWorkerRestarting",
        "max by (job, worker, role) (increase(baton_worker_incarnation[30m]))",
        "> 2",
        "0m",
        "ticket",
        "{{ $labels.worker }} died {{ $value | humanize }} times in 30 minutes.",
    ),
    Alert(
        "BatonSloBurnFast",
        _burning("1h", "5m", 14.4),
        "> 14.4",
        "2m",
        "page",
        "Choices miss their latency objectives {{ $value | humanize }} times faster than the error budget allows.",
    ),
    Alert(
        "BatonSloBurnSlow",
        _burning("6h", "30m", 6),
        "> 6",
        "15m",
        "ticket",
        "Choices miss their latency objectives {{ $value | humanize }} times faster than the error budget allows.",
    ),
    Alert(
        "BatonErrors",
        "job:baton_errors:ratio_5m",
        "> 0.01",
        "5m",
        "page",
        "{{ $value | humanizePercentage }} of the choices end by an error.",
    ),
    Alert(
        "BatonRetries",
        f"{rate(RULE, 'baton_retries', ())} / ({rate(RULE, 'baton_placements', ())} > 0)"
        f" or 0 * {rate(RULE, 'baton_placements', ())}",
        "> 0.05",
        "10m",
        "ticket",
        "{{ $value | humanizePercentage }} of the attempts are retries: workers fail or hand-overs break.",
    ),
    Alert(
        "BatonCompilesAfterWarmup",
        gauge(RULE, "baton_compiles_after_warmup", WORKER),
        "> 0",
        "0m",
        "ticket",
        "{{ $labels.worker }} compiled {{ $value }} programs while it served: each one stalls all of its requests.",
    ),
    Alert(
        "BatonKvPagesExhausted",
        f"{gauge(RULE, 'baton_kv_usage_ratio', WORKER)} * on (job, worker, role) "
        f"({gauge(RULE, 'baton_num_requests_waiting', WORKER)} > bool 0)",
        "> 0.95",
        "5m",
        "ticket",
        "{{ $labels.worker }} holds {{ $value | humanizePercentage }} of its KV pages and requests wait.",
    ),
    Alert(
        "BatonPreemptions",
        increase(RULE.wide("15m"), "baton_preemptions", WORKER),
        "> 10",
        "0m",
        "ticket",
        "{{ $labels.worker }} took pages back from {{ $value | humanize }} running sequences in 15 minutes.",
    ),
    Alert(
        "BatonQueueTime",
        quantile(RULE, 0.99, "baton_queue_seconds", WORKER),
        "> 5",
        "10m",
        "ticket",
        "Sequences wait {{ $value | humanizeDuration }} (p99) on {{ $labels.worker }} before they start.",
    ),
    Alert(
        "BatonTransferFailures",
        increase(RULE, "baton_transfer_failures", LINK),
        "> 3",
        "0m",
        "ticket",
        "{{ $value | humanize }} KV hand-overs from {{ $labels.prefill }} to {{ $labels.decode }} failed in 5 minutes.",
    ),
    Alert(
        "BatonEventLoopLag",
        quantile(RULE, 0.99, "baton_event_loop_lag_seconds", ()),
        "> 0.1",
        "5m",
        "ticket",
        "A gateway's event loop is {{ $value | humanizeDuration }} late (p99): add gateways.",
    ),
    Alert(
        "BatonDeviceMemory",
        f"{gauge(RULE, 'baton_device_memory_used_bytes', WORKER)}"
        f" / {gauge(RULE, 'baton_device_memory_limit_bytes', WORKER)}",
        "> 0.97",
        "5m",
        "ticket",
        "{{ $labels.worker }} uses {{ $value | humanizePercentage }} of its device memory.",
    ),
)


def rule_groups() -> dict[str, Any]:
    """Contents of rules.yml."""
    recordings = [{"record": rule.record, "expr": rule.expr} for rule in RECORDINGS]
    return {"groups": [{"name": "baton", "interval": "15s", "rules": recordings}]}


def alert_groups(runbook: str) -> dict[str, Any]:
    """Contents of alerts.yml.

    Args:
        runbook: address of the runbook; alerts link to their heading in it.
    """
    return {"groups": [{"name": "baton-alerts", "interval": "15s", "rules": _alerts(runbook, ALERTS)}]}


def _alerts(runbook: str, alerts: Sequence[Alert]) -> list[dict[str, Any]]:
    return [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook_url": f"{runbook}#{alert.name.lower()}"},
        }
        for alert in alerts
    ]
