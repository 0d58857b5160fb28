"""Boards about machines: devices, members, and the signals by which pools are scaled."""

from __future__ import annotations

from deploy.monitoring.board_parts import (
    DECODE,
    PREFILL,
    WORKER,
    lines,
    padding_share,
    quantiles,
)
from deploy.monitoring.panels import Board, Panel, Query, Row, Shape
from deploy.monitoring.promql import (
    BOARD,
    gauge,
    pool_gauge,
    rate,
)

DEVICES = Board(
    "baton-tpu",
    "Baton / TPU health",
    "Devices and the processes that drive them.",
    (
        Row(
            "Memory",
            9,
            (
                lines(
                    "HBM in use",
                    "Of the worker's devices together.",
                    "bytes",
                    12,
                    (gauge(BOARD, "baton_device_memory_used_bytes", WORKER), "{{worker}}"),
                ),
                Panel(
                    "HBM share in use",
                    "Above 97 % the next allocation may fail.",
                    Shape.BARS,
                    "percentunit",
                    12,
                    (
                        Query(
                            f"{gauge(BOARD, 'baton_device_memory_used_bytes', WORKER)} / "
                            f"{gauge(BOARD, 'baton_device_memory_limit_bytes', WORKER)}",
                            "{{worker}}",
                        ),
                    ),
                    warn=0.9,
                    bad=0.97,
                ),
            ),
        ),
        Row(
            "Work",
            9,
            (
                lines(
                    "Engine busy",
                    "Duty cycle of the engine thread, which waits for the device.",
                    "percentunit",
                    8,
                    (rate(BOARD, "baton_engine_busy_seconds", WORKER), "{{worker}}"),
                ),
                lines(
                    "Prefill padding", "Wasted token rows.", "percentunit", 8, (padding_share(PREFILL), "{{worker}}")
                ),
                lines(
                    "Decode padding", "Wasted sequence rows.", "percentunit", 8, (padding_share(DECODE), "{{worker}}")
                ),
            ),
        ),
        Row(
            "Trouble",
            9,
            (
                lines(
                    "Compiles after warm-up",
                    "Must stay 0: each one stalls a worker for seconds.",
                    "short",
                    6,
                    (gauge(BOARD, "baton_compiles_after_warmup", WORKER), "{{worker}}"),
                ),
                lines(
                    "Worker event-loop lag",
                    "Longest delay within a second.",
                    "s",
                    6,
                    (gauge(BOARD, "baton_worker_event_loop_lag_seconds", WORKER), "{{worker}}"),
                ),
                lines(
                    "Lives",
                    "Incarnation of each worker: a step up is a death.",
                    "short",
                    6,
                    (gauge(BOARD, "baton_worker_incarnation", WORKER), "{{worker}}"),
                ),
                lines(
                    "Connections refused",
                    "Wrong secret, version or fingerprint; damaged or hostile frames.",
                    "reqps",
                    6,
                    (rate(BOARD, "baton_refused_connections", ("worker", "reason")), "{{worker}} {{reason}}"),
                ),
            ),
        ),
    ),
)


FLEET = Board(
    "baton-fleet",
    "Baton / Fleet and scaling",
    "Who serves, and the signals by which pools grow and shrink.",
    (
        Row(
            "Members",
            9,
            (
                Panel(
                    "Workers",
                    "Connected or away, over time.",
                    Shape.STATES,
                    "short",
                    12,
                    (Query(gauge(BOARD, "baton_worker_connected", WORKER), "{{worker}}"),),
                ),
                lines(
                    "Pool sizes",
                    "Connected workers by role.",
                    "short",
                    12,
                    (pool_gauge(BOARD, "baton_worker_connected", ("role",)), "{{role}}"),
                ),
            ),
        ),
        Row(
            "Autoscaling",
            9,
            (
                lines(
                    "Workers wanted by the autoscaler",
                    "Nothing where it is off. In the mode advise, pools do not follow.",
                    "short",
                    6,
                    (gauge(BOARD, "baton_autoscale_target_workers", ("role",)), "{{role}}"),
                ),
                lines(
                    "Workers asked for",
                    "By the autoscaler, or by baton scale.",
                    "short",
                    6,
                    (gauge(BOARD, "baton_fleet_wanted_workers", ("role",)), "{{role}}"),
                ),
                lines(
                    "Workers by state",
                    "Pending: no node has room for it yet.",
                    "short",
                    6,
                    (gauge(BOARD, "baton_fleet_workers", ("role", "state")), "{{role}} {{state}}"),
                ),
                lines(
                    "Changes",
                    "Per second, by what was found.",
                    "short",
                    6,
                    (
                        rate(BOARD, "baton_autoscale_changes", ("role", "direction", "cause")),
                        "{{role}} {{direction}}: {{cause}}",
                    ),
                ),
            ),
        ),
        Row(
            "Prefill signals",
            9,
            (
                lines(
                    "Queued prompt tokens",
                    "Of the pool together.",
                    "short",
                    12,
                    (pool_gauge(BOARD, "baton_queued_tokens", ("role",)), "{{role}}"),
                ),
                quantiles(
                    "Time to first token",
                    "Its objective is what prefill workers are added for.",
                    "baton_time_to_first_token_seconds",
                    12,
                ),
            ),
        ),
        Row(
            "Decode signals",
            9,
            (
                lines(
                    "Slots in use",
                    "Of the pool together.",
                    "percentunit",
                    8,
                    (
                        f"{pool_gauge(BOARD, 'baton_num_requests_running', (), DECODE)} / "
                        f"{pool_gauge(BOARD, 'baton_slots', (), DECODE)}",
                        "decode",
                    ),
                ),
                lines(
                    "KV pages in use",
                    "Of the pool together.",
                    "percentunit",
                    8,
                    (
                        f"1 - {pool_gauge(BOARD, 'baton_free_pages', ('role',))} / "
                        f"{pool_gauge(BOARD, 'baton_pages', ('role',))}",
                        "{{role}}",
                    ),
                ),
                quantiles(
                    "Time between tokens",
                    "Its objective is what decode workers are added for.",
                    "baton_inter_token_latency_seconds",
                    8,
                ),
            ),
        ),
    ),
)
