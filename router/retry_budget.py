"""How many attempts beyond the first a gateway may make: a share of its requests, so that failures cannot multiply."""

from __future__ import annotations

RATIO = 0.1
RESERVE = 20.0  # attempts that are there without any traffic before


class RetryBudget:
    """A bucket that each request fills by `RATIO` and each retry empties by 1."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens = RESERVE

    def requested(self) -> None:
        """A first attempt."""
        self._tokens = min(self._tokens + RATIO, RESERVE)

    def take(self) -> bool:
        """Whether one more retry may be made; it is then counted."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
