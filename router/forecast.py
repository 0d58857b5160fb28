"""What a rate will be a little later: level and damped trend, with how wrong that has been.

Double exponential smoothing (Holt 1957) with a damped trend (Gardner and McKenzie 1985), over windows of equal length.
"""

from __future__ import annotations

import math

LEVEL, TREND, DAMPING, ERROR = 0.35, 0.10, 0.95, 0.10


class Forecast:
    """Of one non-negative quantity.

    Attributes:
        level: its smoothed value; 0 before the first window.
    """

    def __init__(self) -> None:
        self.level = 0.0
        self._trend = 0.0
        self._variance = 0.0
        self._num_windows = 0

    @property
    def deviation(self) -> float:
        """Standard deviation of the error one window ahead."""
        return math.sqrt(self._variance)

    def add(self, value: float) -> None:
        """The next window's value."""
        self._num_windows += 1
        if self._num_windows == 1:
            self.level = value
            return
        expected = self.level + DAMPING * self._trend
        error = value - expected
        weight = max(ERROR, 1.0 / self._num_windows)
        self._variance += weight * (error * error - self._variance)
        level = expected + LEVEL * error
        self._trend = DAMPING * self._trend + TREND * error
        self.level = max(level, 0.0)

    def at(self, windows: float) -> float:
        """So many windows ahead."""
        steps = DAMPING * (1 - math.pow(DAMPING, windows)) / (1 - DAMPING)
        return max(self.level + steps * self._trend, 0.0)

    def upper(self, windows: float, deviations: float) -> float:
        """The most that it will be from now until then, with so many standard deviations of room."""
        return max(self.level, self.at(windows)) + deviations * self.deviation
