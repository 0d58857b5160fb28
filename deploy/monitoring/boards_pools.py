"""Boards about the work of workers: prefill, decode, and what passes between them."""

from __future__ import annotations

from deploy.monitoring.board_parts import (
    DECODE,
    LINK,
    PREFILL,
    WORKER,
    hit_share,
    lines,
    matrix,
    padding_share,
    stage,
)
from deploy.monitoring.panels import Board, Row
from deploy.monitoring.promql import (
    BOARD,
    gauge,
    increase,
    mean,
    pool_rate,
    quantile,
    rate,
    ratio,
)

PREFILL_POOL = Board(
    "baton-prefill",
    "Baton / Prefill pool",
    "How prompts wait and are computed.",
    (
        Row(
            "Time",
            9,
            (
                stage(
                    "Queue",
                    "From arrival to admission: grows when prefill workers are too few.",
                    "baton_queue_seconds",
                    PREFILL,
                    12,
                ),
                stage("Prefill", "From admission to the first token.", "baton_prefill_seconds", PREFILL, 12),
            ),
        ),
        Row(
            "Work",
            9,
            (
                lines(
                    "Prompt tokens computed",
                    "Per second and worker.",
                    "short",
                    8,
                    (rate(BOARD, "baton_prefill_step_tokens", WORKER, PREFILL), "{{worker}}"),
                ),
                lines(
                    "Queued tokens",
                    "Still to be computed.",
                    "short",
                    8,
                    (gauge(BOARD, "baton_queued_tokens", WORKER, PREFILL), "{{worker}}"),
                ),
                lines(
                    "Engine busy",
                    "Share of time the engine thread is at work.",
                    "percentunit",
                    8,
                    (rate(BOARD, "baton_engine_busy_seconds", WORKER, PREFILL), "{{worker}}"),
                ),
            ),
        ),
        Row(
            "Efficiency",
            9,
            (
                lines(
                    "Padding",
                    "Share of the token rows that only fill buckets.",
                    "percentunit",
                    8,
                    (padding_share(PREFILL), "{{worker}}"),
                ),
                lines("Prefix hits", "Of the tokens looked up.", "percentunit", 8, (hit_share(PREFILL), "{{worker}}")),
                lines(
                    "KV pages in use",
                    "Pages that sequences hold.",
                    "percentunit",
                    8,
                    (gauge(BOARD, "baton_kv_usage_ratio", WORKER, PREFILL), "{{worker}}"),
                ),
            ),
        ),
    ),
)


DECODE_POOL = Board(
    "baton-decode",
    "Baton / Decode pool",
    "How answers are generated.",
    (
        Row(
            "Batch",
            9,
            (
                lines(
                    "Slots in use",
                    "Rows of the decode batch.",
                    "percentunit",
                    8,
                    (
                        f"{gauge(BOARD, 'baton_num_requests_running', WORKER, DECODE)} / "
                        f"{gauge(BOARD, 'baton_slots', WORKER, DECODE)}",
                        "{{worker}}",
                    ),
                ),
                lines(
                    "Waiting",
                    "Sequences that do not decode yet: their KV is on its way, or there is no room.",
                    "short",
                    8,
                    (gauge(BOARD, "baton_num_requests_waiting", WORKER, DECODE), "{{worker}}"),
                ),
                lines(
                    "Mean batch",
                    "Sequences per decode step.",
                    "short",
                    8,
                    (
                        ratio(
                            rate(BOARD, "baton_decode_step_rows", WORKER, DECODE),
                            rate(BOARD, "baton_decode_steps", WORKER, DECODE),
                        ),
                        "{{worker}}",
                    ),
                ),
            ),
        ),
        Row(
            "Time",
            9,
            (
                stage("Queue", "From arrival until pages are reserved.", "baton_queue_seconds", DECODE, 8),
                stage("Decode", "From the first token or the slot to the last.", "baton_decode_seconds", DECODE, 8),
                lines(
                    "Steps",
                    "Decode steps per second: the inverse is the step time.",
                    "short",
                    8,
                    (rate(BOARD, "baton_decode_steps", WORKER, DECODE), "{{worker}}"),
                ),
            ),
        ),
        Row(
            "Memory",
            9,
            (
                lines(
                    "KV pages in use",
                    "Near 1, sequences are preempted.",
                    "percentunit",
                    8,
                    (gauge(BOARD, "baton_kv_usage_ratio", WORKER, DECODE), "{{worker}}"),
                ),
                lines(
                    "Preemptions",
                    "Sequences that gave their pages to others.",
                    "short",
                    8,
                    (increase(BOARD, "baton_preemptions", WORKER, DECODE), "{{worker}}"),
                ),
                lines(
                    "Padding",
                    "Share of the rows that only fill buckets.",
                    "percentunit",
                    8,
                    (padding_share(DECODE), "{{worker}}"),
                ),
            ),
        ),
    ),
)


TRANSFER = Board(
    "baton-transfer",
    "Baton / KV transfer",
    "Hand-overs from every prefill worker to every decode worker.",
    (
        Row(
            "Matrix",
            10,
            (
                matrix(
                    "Bytes per second",
                    "KV received and verified, by pair.",
                    "Bps",
                    rate(BOARD, "baton_transfer_bytes", LINK),
                ),
                matrix(
                    "Speed of a hand-over",
                    "Bytes by the seconds from ticket to last block, which include waiting for prefill.",
                    "Bps",
                    ratio(rate(BOARD, "baton_transfer_bytes", LINK), rate(BOARD, "baton_transfer_link_seconds", LINK)),
                ),
            ),
        ),
        Row(
            "Time",
            9,
            (
                lines(
                    "Hand-over time",
                    "From the ticket to the last verified block.",
                    "s",
                    12,
                    (quantile(BOARD, 0.5, "baton_transfer_seconds", WORKER, DECODE), "{{worker}} p50"),
                    (quantile(BOARD, 0.99, "baton_transfer_seconds", WORKER, DECODE), "{{worker}} p99"),
                ),
                lines(
                    "Mean hand-over time",
                    "By decode worker.",
                    "s",
                    12,
                    (mean(BOARD, "baton_transfer_seconds", WORKER, DECODE), "{{worker}}"),
                ),
            ),
        ),
        Row(
            "Links",
            9,
            (
                lines(
                    "Hand-overs",
                    "Complete ones.",
                    "ops",
                    8,
                    (rate(BOARD, "baton_transfers", LINK), "{{prefill}} to {{decode}}"),
                ),
                lines(
                    "Failures",
                    "The request is placed again after each.",
                    "ops",
                    8,
                    (rate(BOARD, "baton_transfer_failures", LINK), "{{prefill}} to {{decode}}"),
                ),
                lines(
                    "All bytes", "Of the whole fleet.", "Bps", 8, (pool_rate(BOARD, "baton_transfer_bytes", ()), "KV")
                ),
            ),
        ),
    ),
)
