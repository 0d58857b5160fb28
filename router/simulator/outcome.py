"""What came of a run: latencies, goodput, hits, load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.simulator.job import Job

Floats = npt.NDArray[np.float64]
QUANTILES = (0.0, 1.0, 5.0, *(float(rank) for rank in range(10, 100, 5)), 99.0, 99.9, 100.0)
_POINTS = (np.arange(4) + 0.5) / 4  # of a stretch of steps whose time grows in a straight line


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """What makes an answer a good one: both.

    Attributes:
        ttft_s: to the first token at most.
        itl_s: per token behind it, on average over the answer, at most.
    """

    ttft_s: float
    itl_s: float


class Gaps:
    """Times between tokens, weighted by how many tokens saw each."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, float, float, int]] = []

    def add(self, rows: float, first_s: float, last_s: float, num_steps: int) -> None:
        """Steps of so many rows."""
        self._rows.append((rows, first_s, last_s, num_steps))

    def percentiles(self, ranks: Sequence[float]) -> list[float]:
        """Seconds at ranks of 0 to 100; 0 where there was no gap."""
        if not self._rows:
            return [0.0] * len(ranks)
        rows, first, last, steps = np.array(self._rows).T
        seconds = (first[:, None] + (last - first)[:, None] * _POINTS).reshape(-1)
        weights = np.repeat(rows * steps / len(_POINTS), len(_POINTS))
        order = np.argsort(seconds, kind="stable")
        total = np.cumsum(weights[order])
        at = np.searchsorted(total, np.array(ranks) / 100 * total[-1])
        return [float(x) for x in seconds[order][np.minimum(at, len(order) - 1)]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One policy's run.

    Attributes:
        good, goodput_rps: answers that met the objective, and these per second of the trace.
        ttft_quantiles_ms: at the ranks `QUANTILES`.
        hit_ratio: share of the prompt tokens that whoever read the prompt had in its cache.
        fetched_ratio: share of the prompt tokens that it had there because a donor had sent them.
        local_prefills: prompts read by their decode worker.
        prefill_spread, decode_spread: the busiest worker's time over the mean of its role.
        makespan_s, wall_s: until the last answer, in virtual time; and what that took.
        load: per worker, the share of the run in which it computed.
    """

    requests: int
    finished: int
    refused: int
    good: int
    goodput_rps: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    ttft_mean_ms: float
    itl_p50_ms: float
    itl_p90_ms: float
    itl_p99_ms: float
    hit_ratio: float
    fetched_ratio: float
    local_prefills: int
    prefill_spread: float
    decode_spread: float
    transferred_gb: float
    preemptions: int
    retries: int
    makespan_s: float
    wall_s: float
    load: dict[str, float]
    ttft_quantiles_ms: list[float]


def is_good(job: Job, slo: Slo) -> bool:
    """Whether an answer met its objective."""
    return job.last_token_at >= 0 and job.first_token_at - job.arrival_s <= slo.ttft_s and job.mean_itl_s <= slo.itl_s


def spread(busy_s: Sequence[float]) -> float:
    """The busiest worker's load over the mean one; 1 is even."""
    mean = sum(busy_s) / len(busy_s) if busy_s else 0.0
    return max(busy_s) / mean if mean > 0 else 1.0
