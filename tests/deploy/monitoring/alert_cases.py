"""For each alert the series that make it fire, as promtool's unit tests want them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STEPS = 200  # of 15 s; rates over windows longer than that are those of the 50 minutes there are
AT = "50m"


def _flat(value: float) -> str:
    return f"{value:g}x{STEPS}"


def _grows(by: float) -> str:
    return f"0+{by:g}x{STEPS}"


JOB = 'job="baton", instance="g1"'
DECODE = f'{JOB}, worker="decode-0", role="decode"'
PREFILL = f'{JOB}, worker="prefill-0", role="prefill"'
LINK = f'{JOB}, prefill="prefill-0", decode="decode-0"'
DECODE_LABELS = {"job": "baton", "worker": "decode-0", "role": "decode"}
PAGE, TICKET = {"severity": "page"}, {"severity": "ticket"}

HEALTHY = {
    f"up{{{JOB}}}": _flat(1),
    f'baton_choices_total{{{JOB}, finish_reason="stop"}}': _grows(100),
    f'baton_choices_total{{{JOB}, finish_reason="error"}}': _flat(0),
    f"baton_choices_within_slo_total{{{JOB}}}": _grows(100),
    f"baton_worker_connected{{{DECODE}}}": _flat(1),
    f"baton_worker_connected{{{PREFILL}}}": _flat(1),
    f"baton_worker_incarnation{{{DECODE}}}": _flat(1),
    f'baton_fleet_workers{{{JOB}, role="decode", state="pending"}}': _flat(0),
    f'baton_retries_total{{{JOB}, reason="worker_died"}}': _flat(0),
    f"baton_placements_total{{{LINK}}}": _grows(100),
    f"baton_compiles_after_warmup{{{DECODE}}}": _flat(0),
    f"baton_kv_usage_ratio{{{DECODE}}}": _flat(0.99),  # full, but nobody waits
    f"baton_num_requests_waiting{{{DECODE}}}": _flat(0),
    f"baton_preemptions_total{{{DECODE}}}": _flat(0),
    f'baton_queue_seconds_bucket{{{DECODE}, le="1"}}': _grows(10),
    f'baton_queue_seconds_bucket{{{DECODE}, le="10"}}': _grows(10),
    f'baton_queue_seconds_bucket{{{DECODE}, le="+Inf"}}': _grows(10),
    f"baton_transfer_failures_total{{{LINK}}}": _flat(0),
    f'baton_event_loop_lag_seconds_bucket{{{JOB}, le="0.01"}}': _grows(10),
    f'baton_event_loop_lag_seconds_bucket{{{JOB}, le="1"}}': _grows(10),
    f'baton_event_loop_lag_seconds_bucket{{{JOB}, le="+Inf"}}': _grows(10),
    f"baton_device_memory_used_bytes{{{DECODE}}}": _flat(50),
    f"baton_device_memory_limit_bytes{{{DECODE}}}": _flat(100),
}


@dataclass(frozen=True)
class Case:
    """Series (name -> promtool's notation of values) beside a healthy fleet, and what then fires."""

    alert: str
    series: dict[str, str]
    labels: dict[str, str]
    summary: str

    def promtool(self) -> dict[str, Any]:
        """One entry of `tests`. Every other alert must stay silent on the same data."""
        series = {**HEALTHY, **self.series}
        runbook = f"docs/runbook.md#{self.alert.lower()}"
        fired = {"exp_labels": self.labels, "exp_annotations": {"summary": self.summary, "runbook_url": runbook}}
        return {
            "interval": "15s",
            "input_series": [{"series": name, "values": values} for name, values in series.items() if values],
            "alert_rule_test": [
                {"eval_time": AT, "alertname": case.alert, "exp_alerts": [fired] if case.alert == self.alert else []}
                for case in CASES
                if case.alert == self.alert or case.alert not in TOGETHER.get(self.alert, ())
            ],
        }


TOGETHER = {  # alerts that rightly fire with another one
    "BatonNoDecodeWorker": ("BatonWorkerDisconnected",),
    "BatonNoPrefillWorker": ("BatonWorkerDisconnected",),
    "BatonSloBurnFast": ("BatonSloBurnSlow",),
    "BatonSloBurnSlow": ("BatonSloBurnFast",),
    "BatonErrors": ("BatonSloBurnFast", "BatonSloBurnSlow"),
}

CASES: tuple[Case, ...] = (
    Case(
        "BatonGatewayDown",
        {f"up{{{JOB}}}": _flat(0)},
        {"job": "baton", "instance": "g1", **PAGE},
        "The gateway at g1 cannot be scraped.",
    ),
    Case(
        "BatonNoDecodeWorker",
        {f"baton_worker_connected{{{DECODE}}}": ""},
        {"job": "baton", **PAGE},
        "No decode worker is connected: every request waits, then fails with 503.",
    ),
    Case(
        "BatonNoPrefillWorker",
        {f"baton_worker_connected{{{PREFILL}}}": _flat(0)},
        {"job": "baton", "role": "prefill", **PAGE},
        "Prefill workers are known and none is connected: decode workers read all prompts.",
    ),
    Case(
        "BatonWorkerDisconnected",
        {f'baton_worker_connected{{{JOB}, worker="decode-1", role="decode"}}': _flat(0)},
        {"job": "baton", "worker": "decode-1", "role": "decode", **TICKET},
        "decode-1 is a member of the fleet and no gateway is connected to it.",
    ),
    Case(
        "BatonWorkerWithoutNode",
        {f'baton_fleet_workers{{{JOB}, role="decode", state="pending"}}': _flat(2)},
        {"job": "baton", "role": "decode", **TICKET},
        "2 decode workers have had no node for 15 minutes.",
    ),
    Case(
        "BatonWorkerRestarting",
        {f"baton_worker_incarnation{{{DECODE}}}": f"1x{STEPS - 61} 2x20 3x20 4x20"},
        {**DECODE_LABELS, **TICKET},
        "decode-0 died 3 times in 30 minutes.",
    ),
    Case(
        "BatonSloBurnFast",
        {f"baton_choices_within_slo_total{{{JOB}}}": _grows(50)},
        {"job": "baton", **PAGE},
        "Choices miss their latency objectives 50 times faster than the error budget allows.",
    ),
    Case(
        "BatonSloBurnSlow",
        {f"baton_choices_within_slo_total{{{JOB}}}": _grows(90)},
        {"job": "baton", **TICKET},
        "Choices miss their latency objectives 10 times faster than the error budget allows.",
    ),
    Case(
        "BatonErrors",
        {f'baton_choices_total{{{JOB}, finish_reason="error"}}': _grows(100)},
        {"job": "baton", **PAGE},
        "50% of the choices end by an error.",
    ),
    Case(
        "BatonRetries",
        {f'baton_retries_total{{{JOB}, reason="worker_died"}}': _grows(25)},
        {"job": "baton", **TICKET},
        "25% of the attempts are retries: workers fail or hand-overs break.",
    ),
    Case(
        "BatonCompilesAfterWarmup",
        {f"baton_compiles_after_warmup{{{DECODE}}}": _flat(2)},
        {**DECODE_LABELS, **TICKET},
        "decode-0 compiled 2 programs while it served: each one stalls all of its requests.",
    ),
    Case(
        "BatonKvPagesExhausted",
        {f"baton_num_requests_waiting{{{DECODE}}}": _flat(3)},
        {**DECODE_LABELS, **TICKET},
        "decode-0 holds 99% of its KV pages and requests wait.",
    ),
    Case(
        "BatonPreemptions",
        {f"baton_preemptions_total{{{DECODE}}}": _grows(1)},
        {**DECODE_LABELS, **TICKET},
        "decode-0 took pages back from 60 running sequences in 15 minutes.",
    ),
    Case(
        "BatonQueueTime",
        {f'baton_queue_seconds_bucket{{{DECODE}, le="1"}}': _flat(0)},
        {**DECODE_LABELS, **TICKET},
        "Sequences wait 9.91s (p99) on decode-0 before they start.",
    ),
    Case(
        "BatonTransferFailures",
        {f"baton_transfer_failures_total{{{LINK}}}": _grows(1)},
        {"job": "baton", "prefill": "prefill-0", "decode": "decode-0", **TICKET},
        "20 KV hand-overs from prefill-0 to decode-0 failed in 5 minutes.",
    ),
    Case(
        "BatonEventLoopLag",
        {f'baton_event_loop_lag_seconds_bucket{{{JOB}, le="0.01"}}': _flat(0)},
        {"job": "baton", **TICKET},
        "A gateway's event loop is 990.1ms late (p99): add gateways.",
    ),
    Case(
        "BatonDeviceMemory",
        {f"baton_device_memory_used_bytes{{{DECODE}}}": _flat(98)},
        {**DECODE_LABELS, **TICKET},
        "decode-0 uses 98% of its device memory.",
    ),
)
