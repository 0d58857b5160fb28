"""Several runs over one trace: scenarios times loads, on several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from router.simulator.cluster import Cluster, Scenario, hash_trace
from router.simulator.oracle import INFINITE, Capacity, capacity, hit_ratio
from router.simulator.outcome import Outcome
from router.simulator.trace import Trace

# What can be switched off in joint placement -> the field of its configuration that does it.
TERMS = {
    "queue": "queue",
    "prefill": "prefill",
    "transfer": "transfer",
    "itl": "itl",
    "crowding": "crowding",
    "followers": "followers",
    "donor": "donors",
    "local-prefill": "local_prefill_tokens",
}


@dataclass(frozen=True, slots=True)
class Point:
    """All scenarios at one load."""

    load: float
    offered_rps: float
    outcomes: dict[str, Outcome]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {"load": self.load, "offered_rps": self.offered_rps}


@dataclass(frozen=True, slots=True)
class Results:
    """Everything."""

    description: str
    fleet: str
    capacity: Capacity
    ideal_hit_ratio: float
    oracle_hit_ratio: float
    fleet_oracle_hit_ratio: float
    points: tuple[Point, ...]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ideal_hit_ratio": self.ideal_hit_ratio,
            "oracle_hit_ratio": self.oracle_hit_ratio,
            "fleet_oracle_hit_ratio": self.fleet_oracle_hit_ratio,
            "capacity_rps": self.capacity.rps,
            "prefill_capacity_rps": self.capacity.prefill_rps,
            "decode_capacity_rps": self.capacity.decode_rps,
            "link_capacity_rps": None if self.capacity.link_rps == float("inf") else self.capacity.link_rps,
        }


def run_all(trace: Trace, scenarios: Mapping[str, Scenario], loads: Sequence[float], num_processes: int) -> Results:
    """Run every scenario at every load; no load means the trace's own clock.

    Raises:
        ConfigError: a request does not fit into a worker.
    """
    scenario = next(iter(scenarios.values()))
    profile = scenario.profile
    can = capacity(trace, profile, scenario.num_prefill, scenario.num_decode)
    rate = len(trace.requests) / trace.duration_s
    factors = [rate / (load * can.rps) for load in loads] or [1.0]
    tasks = [(factor, name) for factor in factors for name in scenarios]
    outcomes = _run(trace, scenarios, tasks, num_processes)
    readers = scenario.num_prefill or scenario.num_decode
    blocks = profile.kv_tokens // trace.block_tokens
    count = len(trace.requests)
    mean_tokens = trace.input_tokens / count
    return Results(
        description=f"{count} requests in {trace.duration_s:.0f} s, {mean_tokens:.0f} prompt tokens each",
        fleet=f"{scenario.num_prefill}P{scenario.num_decode}D of {profile.source}, fit for {can.rps:.2f} requests/s",
        capacity=can,
        ideal_hit_ratio=hit_ratio(trace, INFINITE),
        oracle_hit_ratio=hit_ratio(trace, readers * blocks),
        fleet_oracle_hit_ratio=hit_ratio(trace, (scenario.num_prefill + scenario.num_decode) * blocks),
        points=tuple(
            Point(
                rate / factor / can.rps,
                rate / factor,
                {name: outcomes[factor, name] for name in scenarios},
            )
            for factor in factors
        ),
    )


def _run(
    trace: Trace, scenarios: Mapping[str, Scenario], tasks: Sequence[tuple[float, str]], num_processes: int
) -> dict[tuple[float, str], Outcome]:
    if num_processes == 1 or len(tasks) == 1:
        hashes = hash_trace(trace)
        return {(factor, name): Cluster(trace.scaled(factor), hashes, scenarios[name]).run() for factor, name in tasks}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(tasks)), mp_context=context) as pool:
        jobs = {(factor, name): pool.submit(_play, trace.scaled(factor), scenarios[name]) for factor, name in tasks}
        return {task: job.result() for task, job in jobs.items()}


def _play(trace: Trace, scenario: Scenario) -> Outcome:
    return Cluster(trace, hash_trace(trace), scenario).run()
