"""What placement weighs of a worker besides the blocks it holds and the speed of its steps.

It changes only by what happens to the worker; the moment is an argument of every formula.
"""

from __future__ import annotations

import math
from typing import NamedTuple

WINDOW_S = 10.0  # over which recent work is averaged
MAX_UTILIZATION = 0.95


class Standing(NamedTuple):
    """Of one worker.

    Attributes:
        placed_s: prompts placed there and not read yet, as if the first of them had just begun.
        head_s, head_since: that first one.
        told_s, told_at: prompts that the worker spoke of, and those placed since; minus infinity for none.
        busy_s, busy_at: prompts placed lately, a sum that decays from then on.
        mean_prefill_s: of a prompt.
        rows, kv_tokens: sequences that decode there or soon will.
        arrivals, arrived_at: sequences placed lately, a sum that decays from then on.
        turn: number of the last placement; breaks ties.
    """

    placed_s: float
    head_s: float
    head_since: float
    told_s: float
    told_at: float
    busy_s: float
    busy_at: float
    mean_prefill_s: float
    rows: int
    kv_tokens: float
    arrivals: float
    arrived_at: float
    turn: int

    def queue_s(self, now: float) -> float:
        """Seconds of prefill that a new prompt would wait for.

        This gateway knows its own part to the moment, other gateways' only from beats: whichever is more.
        """
        own_s = self.placed_s - min(self.head_s, now - self.head_since)
        return max(own_s, self.told_s - (now - self.told_at), 0.0)

    def busy(self, now: float) -> float:
        """Share of the recent past that the prefill placed here fills, 0 to `MAX_UTILIZATION`."""
        return min(self.busy_s * math.exp((self.busy_at - now) / WINDOW_S) / WINDOW_S, MAX_UTILIZATION)

    def expected_wait_s(self, now: float) -> float:
        """Mean wait at the recent utilization, as in an M/M/1 queue with half its service time left on average.

        Requests that come one at a time find every queue empty; without this term the worker that holds the most
        popular prefix would get all of them until it is saturated.
        """
        busy = self.busy(now)
        return 0.5 * busy / (1 - busy) * self.mean_prefill_s

    def arrivals_per_s(self, now: float) -> float:
        """Decoding requests placed here per second, lately."""
        return self.arrivals * math.exp((self.arrived_at - now) / WINDOW_S) / WINDOW_S
