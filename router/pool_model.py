"""What a pool of slices would do with a load: TTFT of so many prefill slices, ITL and KV of so many decode slices.

Waiting: an M/G/c queue by Sakasegawa's approximation (1977), which holds for a fractional number of servers, too; its
tail is taken for exponential. Decode: rows by Little's law, a fixed point as a fuller batch takes longer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCosts:
    """A decode step takes `step_s + row_s * rows + token_s * KV tokens`; a slice has room for so much."""

    step_s: float
    row_s: float
    token_s: float
    num_slots: int
    kv_tokens: int

    def seconds(self, rows: float, context: float) -> float:
        """One step of so many rows of `context` tokens each."""
        return self.step_s + rows * (self.row_s + self.token_s * context)


def mean_costs(costs: Sequence[DecodeCosts]) -> DecodeCosts:
    """Of several slices, at least one, which are taken to be of one kind: each knows its own part of the range best."""
    count = len(costs)
    return dataclasses.replace(
        costs[0],
        step_s=sum(one.step_s for one in costs) / count,
        row_s=sum(one.row_s for one in costs) / count,
        token_s=sum(one.token_s for one in costs) / count,
    )


def smoothed(old: DecodeCosts | None, new: DecodeCosts, gain: float) -> DecodeCosts:
    """A running mean: what is learned from batches that hardly differ swings between a step's constant part and KV."""
    if old is None:
        return new
    return dataclasses.replace(
        new,
        step_s=old.step_s + gain * (new.step_s - old.step_s),
        row_s=old.row_s + gain * (new.row_s - old.row_s),
        token_s=old.token_s + gain * (new.token_s - old.token_s),
    )


@dataclass(frozen=True, slots=True)
class DecodeState:
    """One slice of a decode pool: rows on average and nearly at most, time between tokens then, share of KV then."""

    rows: float
    peak_rows: float
    itl_s: float
    kv_share: float
    slot_share: float


def ttft_attainment(service_s: Sequence[float], rate_rps: float, servers: float, ttft_s: float) -> float:
    """Share of requests whose first token comes in time.

    Args:
        service_s: prefill seconds of recent requests, alone on a slice.
        rate_rps: arrivals.
        servers: slices that read prompts.
        ttft_s: the objective.
    """
    if not len(service_s) or rate_rps <= 0:
        return 1.0
    service = np.asarray(service_s)
    mean = float(service.mean())
    busy = rate_rps * mean / servers if servers > 0 else math.inf
    if busy >= 1:
        return 0.0
    variation = float(service.var()) / (mean * mean)
    delayed = busy ** (math.sqrt(2 * (servers + 1)) - 1)
    wait_s = mean * (1 + variation) / 2 / (servers * (1 - busy))  # of those that wait
    room = ttft_s - service
    return float(np.where(room >= 0, 1 - delayed * np.exp(-np.maximum(room, 0.0) / wait_s), 0.0).mean())


def decode_state(
    costs: DecodeCosts, rate_rps: float, output_tokens: float, context: float, slices: int, deviations: float
) -> DecodeState:
    """A slice of a pool that shares the load evenly; the number of rows is taken for Poisson."""
    per_slice = rate_rps / slices if slices else math.inf
    if not math.isfinite(per_slice):
        return DecodeState(math.inf, math.inf, math.inf, math.inf, math.inf)
    per_row = per_slice * output_tokens * (costs.row_s + costs.token_s * context)
    if per_row >= 1:  # every row added makes steps longer by more than it brings forward
        return DecodeState(math.inf, math.inf, math.inf, math.inf, math.inf)
    rows = per_slice * output_tokens * costs.step_s / (1 - per_row)
    peak = rows + deviations * math.sqrt(rows)
    return DecodeState(
        rows, peak, costs.seconds(peak, context), peak * context / costs.kv_tokens, peak / costs.num_slots
    )


def spare_share(
    costs: DecodeCosts, rate_rps: float, output_tokens: float, context: float, slices: int, itl_s: float
) -> float:
    """Share of its time in which a slice of such a pool can read prompts while its tokens come `itl_s` apart at most.

    Tokens take a share of its time that no fuller batch saves. What is left when the constant part of a step has its
    time between any two tokens is for prompts.
    """
    if not slices:
        return 0.0
    tokens = rate_rps / slices * output_tokens * (costs.row_s + costs.token_s * context)
    return max(0.0, 1 - tokens - costs.step_s / itl_s)
