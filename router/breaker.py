"""A circuit breaker: a worker that keeps failing is left alone for a while, then tried with one request at a time.

CLOSED --`max_failures` in a row--> OPEN --after a pause--> HALF_OPEN --success--> CLOSED
                                     ^----------failure, twice the pause----'
"""

from __future__ import annotations

from enum import StrEnum

MAX_FAILURES = 3
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0
PROBE_S = 30.0  # a probe that nobody heard of again is given up


class BreakerState(StrEnum):
    """See the module."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Of one worker in one role. Time is an argument.

    Attributes:
        state: see the module.
        num_opened: times that it opened.
    """

    __slots__ = ("_failures", "_pause_s", "_probing_since", "_until", "num_opened", "state")

    def __init__(self) -> None:
        self.state = BreakerState.CLOSED
        self.num_opened = 0
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._until = 0.0
        self._probing_since: float | None = None

    def allows(self, now: float) -> bool:
        """Whether a request may go there now."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.OPEN:
            return now >= self._until
        return self._probing_since is None or now - self._probing_since > PROBE_S

    def placed(self, now: float) -> None:
        """A request goes there; where the breaker is not closed, it is the probe."""
        if self.state is not BreakerState.CLOSED:
            self.state = BreakerState.HALF_OPEN
            self._probing_since = now

    def abandoned(self) -> None:
        """The request ended without saying anything about the worker."""
        self._probing_since = None

    def succeeded(self) -> None:
        """The worker answered."""
        self.state = BreakerState.CLOSED
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._probing_since = None

    def failed(self, now: float) -> None:
        """The worker failed a request."""
        self._failures += 1
        if self.state is BreakerState.HALF_OPEN:
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        elif self.state is BreakerState.OPEN or self._failures < MAX_FAILURES:
            return
        self.state = BreakerState.OPEN
        self.num_opened += 1
        self._until = now + self._pause_s
        self._probing_since = None
