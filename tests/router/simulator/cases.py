"""Small fleets whose times can be computed by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from router.placement import PlacementConfig
from router.simulator.cluster import Cluster, Scenario, hash_trace
from router.simulator.outcome import Slo
from router.simulator.profile import WorkerProfile
from router.simulator.trace import Trace, TracedRequest

BLOCK = 10
PROFILE = WorkerProfile(
    source="test",
    prefill_step_s=1.0,
    prefill_token_s=0.1,
    prefill_pair_s=0.0,
    decode_step_s=0.5,
    decode_row_s=0.25,
    decode_token_s=0.0,
    kv_tokens=1000,
    kv_token_bytes=1,
    chunk_tokens=20,
    prefill_rows=4,
    num_slots=4,
    link_bytes_per_s=10.0,
    message_s=0.0,
    jitter=0.0,
)
SCENARIO = Scenario(
    policy="round-robin",
    placement=PlacementConfig(max_backlog_s=1e9, overcommit=1e9),
    num_prefill=1,
    num_decode=1,
    profile=PROFILE,
    speeds={},
    crashes=(),
    lost_events=0.0,
    max_wait_s=1e6,
    slo=Slo(ttft_s=10.0, itl_s=1.0),
    seed=0,
)


def trace_of(*rows: tuple[float, Sequence[int], int, int]) -> Trace:
    """Rows: arrival, block ids, tokens, output tokens."""
    return Trace(tuple(TracedRequest(at, n, out, np.array(blocks, np.int32)) for at, blocks, n, out in rows), BLOCK)


def cluster(trace: Trace, profile: dict[str, object] | None = None, **changes: object) -> Cluster:
    """A fleet that differs from `SCENARIO` in a few things."""
    scenario = dataclasses.replace(SCENARIO, profile=dataclasses.replace(PROFILE, **(profile or {})), **changes)
    return Cluster(trace, hash_trace(trace), scenario)
