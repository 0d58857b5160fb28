"""What placement weighs of a worker besides the blocks it holds, as numbers; and of many workers, as arrays.

The formulas of `pair_costs` take either: one worker's `Standing` holds numbers, that of a list of workers `[n] f64`
arrays. A worker's standing changes only by what happens to it; the moment is an argument of every formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

WINDOW_S = 10.0  # over which recent work is averaged
MAX_UTILIZATION = 0.95


class Standing(NamedTuple):
    """One worker, or (all fields arrays) several.

    Attributes:
        prefill_step_s, prefill_token_s, prefill_pair_s, decode_step_s, decode_row_s, decode_token_s: what steps take.
        chunk_tokens: of one prefill step; infinite where prompts are read in one.
        page_size, block_bytes: as the worker says.
        placed_s: prompts placed there and not read yet, as if the first of them had just begun.
        head_s, head_since: that first one.
        told_s, told_at: prompts that the worker spoke of, and those placed since; minus infinity for none.
        busy_s, busy_at: prompts placed lately, a sum that decays from then on.
        mean_prefill_s: of a prompt.
        rows, kv_tokens: sequences that decode there or soon will.
        arrivals, arrived_at: sequences placed lately, a sum that decays from then on.
    """

    prefill_step_s: Any
    prefill_token_s: Any
    prefill_pair_s: Any
    decode_step_s: Any
    decode_row_s: Any
    decode_token_s: Any
    chunk_tokens: Any
    page_size: Any
    block_bytes: Any
    placed_s: Any
    head_s: Any
    head_since: Any
    told_s: Any
    told_at: Any
    busy_s: Any
    busy_at: Any
    mean_prefill_s: Any
    rows: Any
    kv_tokens: Any
    arrivals: Any
    arrived_at: Any

    def queue_s(self, now: float) -> Any:
        """Seconds of prefill that a new prompt would wait for.

        This gateway knows its own part to the moment, other gateways' only from beats: whichever is more.
        """
        own_s = self.placed_s - smaller(self.head_s, now - self.head_since)
        return larger(larger(own_s, self.told_s - (now - self.told_at)), 0.0)

    def num_steps(self, num_tokens: Any) -> Any:
        """Prefill steps for so many tokens."""
        return -(-num_tokens // self.chunk_tokens)

    def prefill_s(self, num_tokens: Any, context: Any) -> Any:
        """Compute `num_tokens` of a prompt behind `context` tokens that are there already."""
        pairs = num_tokens * context + num_tokens * (num_tokens + 1) / 2
        fixed_s = self.prefill_step_s * self.num_steps(num_tokens)
        return fixed_s + self.prefill_token_s * num_tokens + self.prefill_pair_s * pairs

    def busy(self, now: float) -> Any:
        """Share of the recent past that the prefill placed here fills, 0 to `MAX_UTILIZATION`."""
        return smaller(self.busy_s * decayed(self.busy_at, now) / WINDOW_S, MAX_UTILIZATION)

    def expected_wait_s(self, now: float) -> Any:
        """Mean wait at the recent utilization, as in an M/M/1 queue with half its service time left on average.

        Requests that come one at a time find every queue empty; without this term the worker that holds the most
        popular prefix would get all of them until it is saturated.
        """
        busy = self.busy(now)
        return 0.5 * busy / (1 - busy) * self.mean_prefill_s

    def arrivals_per_s(self, now: float) -> Any:
        """Decoding requests placed here per second, lately."""
        return self.arrivals * decayed(self.arrived_at, now) / WINDOW_S


class HasStanding(Protocol):
    """A worker."""

    def standing(self) -> Standing:
        """The same object until something changes."""


class Standings:
    """Of a list of workers, as arrays; only what changed since the last call is written."""

    def __init__(self) -> None:
        self._seen: Sequence[Standing | None] = ()
        self._fields = np.zeros((len(Standing._fields), 0))

    def of(self, workers: Sequence[HasStanding]) -> Standing:
        """Arrays that are valid until the next call."""
        if len(workers) != len(self._seen):
            self._seen = (None,) * len(workers)
            self._fields = np.zeros((len(Standing._fields), len(workers)))
        standings = [worker.standing() for worker in workers]
        changed = [at for at, (one, seen) in enumerate(zip(standings, self._seen, strict=True)) if one is not seen]
        for at in changed:
            self._fields[:, at] = standings[at]
        self._seen = standings
        return Standing(*self._fields)


def larger(one: Any, other: Any) -> Any:
    """The larger of two numbers, or of each two."""
    return max(one, other) if isinstance(one, float | int) else np.maximum(one, other)


def smaller(one: Any, other: Any) -> Any:
    """The smaller of two numbers, or of each two."""
    return min(one, other) if isinstance(one, float | int) else np.minimum(one, other)


def decayed(since: Any, now: float) -> Any:
    """What is left of 1."""
    ages = (since - now) / WINDOW_S
    return math.exp(ages) if isinstance(ages, float) else np.exp(ages)
