"""Boards about requests: overview and SLO, gateway, router. Every panel says in its help what good looks like."""

from __future__ import annotations

from deploy.monitoring.board_parts import (
    DECODE,
    LINK,
    WORKER,
    heat,
    lines,
    matrix,
    number,
    quantiles,
)
from deploy.monitoring.panels import Board, Row
from deploy.monitoring.promql import (
    BOARD,
    attainment,
    error_ratio,
    gauge,
    mean,
    pool_gauge,
    quantile,
    rate,
    ratio,
)

OVERVIEW = Board(
    "baton-overview",
    "Baton / Overview and SLO",
    "Whether clients get what they were promised, and how much work is done.",
    (
        Row(
            "Now",
            5,
            (
                number(
                    "Within the SLO",
                    "Share of the choices that met both latency objectives.",
                    "percentunit",
                    4,
                    attainment(BOARD),
                    0.99,
                    0.95,
                ),
                number(
                    "Errors",
                    "Share of the choices that ended by an error.",
                    "percentunit",
                    4,
                    error_ratio(BOARD),
                    0.001,
                    0.01,
                ),
                number(
                    "TTFT p99",
                    "Time to the first token.",
                    "s",
                    4,
                    quantile(BOARD, 0.99, "baton_time_to_first_token_seconds", ()),
                ),
                number(
                    "ITL p99",
                    "Time between two chunks of a choice.",
                    "s",
                    4,
                    quantile(BOARD, 0.99, "baton_inter_token_latency_seconds", ()),
                ),
                number(
                    "Requests", "HTTP requests answered, all statuses.", "reqps", 4, rate(BOARD, "baton_requests", ())
                ),
                number("Output tokens/s", "Generated tokens.", "short", 4, rate(BOARD, "baton_generation_tokens", ())),
            ),
        ),
        Row(
            "Latency",
            9,
            (
                quantiles(
                    "Time to first token",
                    "Objective: the dashed value of baton_slo_seconds.",
                    "baton_time_to_first_token_seconds",
                    8,
                ),
                quantiles(
                    "Time between tokens", "Between two chunks of one choice.", "baton_inter_token_latency_seconds", 8
                ),
                quantiles("End to end", "From arrival to the last token.", "baton_e2e_request_latency_seconds", 8),
            ),
        ),
        Row(
            "Service level",
            9,
            (
                lines(
                    "Goodput",
                    "Choices per second within both objectives, beside all that ended.",
                    "reqps",
                    8,
                    (rate(BOARD, "baton_choices_within_slo", ()), "within the SLO"),
                    (rate(BOARD, "baton_choices", ()), "all"),
                ),
                lines(
                    "Attainment",
                    "From the recording rules; below the objective the error budget burns.",
                    "percentunit",
                    8,
                    ('job:baton_slo_attainment:ratio_5m{job=~"$job"}', "5 min"),
                    ('job:baton_slo_attainment:ratio_1h{job=~"$job"}', "1 h"),
                ),
                lines(
                    "Objectives",
                    "What the gateway counts goodput by.",
                    "s",
                    8,
                    ('max by (objective) (baton_slo_seconds{job=~"$job"})', "{{objective}}"),
                ),
            ),
        ),
        Row(
            "Work",
            9,
            (
                lines(
                    "Tokens",
                    "Prompt tokens accepted, of these found in a prefix cache, and generated.",
                    "short",
                    12,
                    (rate(BOARD, "baton_prompt_tokens", ()), "prompt"),
                    (rate(BOARD, "baton_cached_prompt_tokens", ()), "cached"),
                    (rate(BOARD, "baton_generation_tokens", ()), "generated"),
                ),
                lines(
                    "Workers connected",
                    "By role. A drop is a death or a scale-down.",
                    "short",
                    12,
                    (pool_gauge(BOARD, "baton_worker_connected", ("role",)), "{{role}}"),
                ),
            ),
        ),
    ),
)


GATEWAY = Board(
    "baton-gateway",
    "Baton / Gateway",
    "HTTP, streams and the process that serves them.",
    (
        Row(
            "Requests",
            9,
            (
                lines(
                    "By status",
                    "499: the client left. 503: no capacity.",
                    "reqps",
                    8,
                    (rate(BOARD, "baton_requests", ("status",)), "{{status}}"),
                ),
                lines(
                    "By endpoint",
                    "Answered requests.",
                    "reqps",
                    8,
                    (rate(BOARD, "baton_requests", ("endpoint",)), "{{endpoint}}"),
                ),
                lines(
                    "How choices end",
                    "stop and length are good ends.",
                    "reqps",
                    8,
                    (rate(BOARD, "baton_choices", ("finish_reason",)), "{{finish_reason}}"),
                ),
            ),
        ),
        Row(
            "Streams",
            9,
            (
                lines(
                    "In progress",
                    "Choices, by gateway.",
                    "short",
                    8,
                    (gauge(BOARD, "baton_streams_running", ("instance",)), "{{instance}}"),
                ),
                lines(
                    "Retries",
                    "Attempts beyond a stream's first, by what failed before.",
                    "reqps",
                    8,
                    (rate(BOARD, "baton_retries", ("reason",)), "{{reason}}"),
                ),
                lines(
                    "Clients that left",
                    "Disconnects before the end of the answer.",
                    "reqps",
                    8,
                    (rate(BOARD, "baton_client_disconnects", ()), "disconnects"),
                ),
            ),
        ),
        Row(
            "Lengths",
            9,
            (
                lines(
                    "Prompt tokens",
                    "Of choices placed.",
                    "short",
                    12,
                    (quantile(BOARD, 0.5, "baton_request_prompt_tokens", ()), "p50"),
                    (quantile(BOARD, 0.99, "baton_request_prompt_tokens", ()), "p99"),
                ),
                lines(
                    "Generated tokens",
                    "Of choices that ended.",
                    "short",
                    12,
                    (quantile(BOARD, 0.5, "baton_request_generation_tokens", ()), "p50"),
                    (quantile(BOARD, 0.99, "baton_request_generation_tokens", ()), "p99"),
                ),
            ),
        ),
        Row(
            "Process",
            9,
            (
                heat(
                    "Event-loop lag",
                    "How late the loop wakes up. Above 0.1 s tokens are held up: add gateways.",
                    "baton_event_loop_lag_seconds",
                    8,
                ),
                lines(
                    "CPU",
                    "Cores used; a gateway is one thread, so 1 is the limit.",
                    "short",
                    8,
                    ('rate(process_cpu_seconds_total{job=~"$job"}[$__rate_interval])', "{{instance}}"),
                ),
                lines(
                    "Memory", "Resident.", "bytes", 8, ('process_resident_memory_bytes{job=~"$job"}', "{{instance}}")
                ),
            ),
        ),
    ),
)


ROUTER = Board(
    "baton-router",
    "Baton / Router",
    "Where requests go, and whether that is where their prefixes are.",
    (
        Row(
            "Placement",
            10,
            (
                matrix(
                    "Attempts per second",
                    "By pair; local: the decode worker reads the prompt itself.",
                    "reqps",
                    rate(BOARD, "baton_placements", LINK),
                ),
                lines(
                    "Attempts by prefill worker",
                    "Even is good unless prefixes say otherwise.",
                    "reqps",
                    12,
                    (rate(BOARD, "baton_placements", ("prefill",)), "{{prefill}}"),
                ),
            ),
        ),
        Row(
            "Reuse",
            9,
            (
                lines(
                    "Cached share of prompt tokens",
                    "What clients are told as cached_tokens.",
                    "percentunit",
                    12,
                    (
                        ratio(rate(BOARD, "baton_cached_prompt_tokens", ()), rate(BOARD, "baton_prompt_tokens", ())),
                        "cached",
                    ),
                ),
                lines(
                    "Prefix hits by worker",
                    "Found of the tokens looked up; on decode workers these are tokens that need no transfer.",
                    "percentunit",
                    12,
                    (
                        ratio(
                            rate(BOARD, "baton_prefix_hit_tokens", WORKER),
                            rate(BOARD, "baton_prefix_query_tokens", WORKER),
                        ),
                        "{{worker}}",
                    ),
                ),
            ),
        ),
        Row(
            "Queue",
            9,
            (
                lines(
                    "Waiting",
                    "Requests in the gateways' queues: they wait while no worker has room.",
                    "short",
                    8,
                    (gauge(BOARD, "baton_requests_waiting", ("instance",)), "{{instance}}"),
                ),
                lines(
                    "Wait in the queue",
                    "Mean of the requests that waited.",
                    "s",
                    8,
                    (mean(BOARD, "baton_queue_wait_seconds", ()), "mean"),
                ),
                lines(
                    "Refused",
                    "Requests that found no room or no worker, by reason.",
                    "reqps",
                    8,
                    (rate(BOARD, "baton_refused_requests", ("reason",)), "{{reason}}"),
                ),
            ),
        ),
        Row(
            "Decisions",
            9,
            (
                quantiles(
                    "Time of a decision",
                    "Hashing, matching, costs and reservation: on the gateway's one thread.",
                    "baton_placement_decision_seconds",
                    8,
                ),
                heat(
                    "Error of the predicted TTFT",
                    "Later (+) or earlier (-) than predicted. A shift means that the costs are not learned well.",
                    "baton_ttft_prediction_error_seconds",
                    8,
                ),
                lines(
                    "Breakers",
                    "0 while a worker is left alone because requests failed there.",
                    "short",
                    8,
                    (gauge(BOARD, "baton_breaker_closed", WORKER), "{{worker}}"),
                ),
            ),
        ),
        Row(
            "Terms",
            8,
            (
                lines(
                    "Terms of placement",
                    "What chosen pairs were predicted to cost, on average by term; queue, fetch and prefill are TTFT.",
                    "s",
                    16,
                    (mean(BOARD, "baton_placement_term_seconds", ("term",)), "{{term}}"),
                ),
                lines(
                    "Fetches",
                    "Attempts whose prefill worker was to fetch leading blocks from a donor.",
                    "reqps",
                    8,
                    (rate(BOARD, "baton_fetches", ("instance",)), "{{instance}}"),
                ),
            ),
        ),
        Row(
            "Global index",
            9,
            (
                lines(
                    "Blocks",
                    "Distinct blocks that a gateway knows to be cached somewhere.",
                    "short",
                    4,
                    (gauge(BOARD, "baton_index_blocks", ("instance",)), "{{instance}}"),
                ),
                lines(
                    "Memory",
                    "Of the index.",
                    "bytes",
                    4,
                    (gauge(BOARD, "baton_index_bytes", ("instance",)), "{{instance}}"),
                ),
                lines(
                    "Staleness",
                    "For how long a gateway has lacked events of a worker: above 0 its placements miss cached blocks.",
                    "s",
                    6,
                    (gauge(BOARD, "baton_index_staleness_seconds", WORKER), "{{worker}}"),
                ),
                lines(
                    "Feeds",
                    "1 while a worker's events are complete; else its blocks are not believed until a snapshot came.",
                    "short",
                    4,
                    (gauge(BOARD, "baton_block_feed_live", WORKER), "{{worker}}"),
                ),
                lines(
                    "Gaps and strays",
                    "Missing events, and messages of an earlier life of a worker.",
                    "short",
                    6,
                    (rate(BOARD, "baton_block_feed_gaps", WORKER), "{{worker}} gaps"),
                    (rate(BOARD, "baton_block_feed_fenced", WORKER), "{{worker}} strays"),
                ),
            ),
        ),
        Row(
            "Signals",
            9,
            (
                lines(
                    "Queued prompt tokens",
                    "By worker: what placement compares for prefill.",
                    "short",
                    8,
                    (gauge(BOARD, "baton_queued_tokens", WORKER), "{{worker}}"),
                ),
                lines(
                    "Requests per slot",
                    "Of decode workers: what placement compares for decode. Above 1 requests wait.",
                    "percentunit",
                    8,
                    (
                        f"({gauge(BOARD, 'baton_num_requests_running', WORKER, DECODE)} + "
                        f"{gauge(BOARD, 'baton_num_requests_waiting', WORKER, DECODE)}) / "
                        f"{gauge(BOARD, 'baton_slots', WORKER, DECODE)}",
                        "{{worker}}",
                    ),
                ),
                lines(
                    "Suspects",
                    "1 while a worker is silent for longer than it should be.",
                    "short",
                    8,
                    (gauge(BOARD, "baton_worker_suspect", WORKER), "{{worker}}"),
                ),
            ),
        ),
    ),
)
