"""What a rate will be a little later: level and damped trend, with how wrong that has been.

Double exponential smoothing (Holt 1957) with a damped trend (Gardner and McKenzie 1985), over windows of equal length,
several times, from quick to slow: a quick one follows a load that turns within minutes, a slow one is not led astray by
the noise of single windows. Whichever has erred the least of late, as far ahead as is asked for, is believed.
"""

from __future__ import annotations

import math
from collections import deque

GAINS = ((0.35, 0.10, 0.95), (0.20, 0.03, 0.98), (0.12, 0.012, 0.99))  # of level and trend; damping. From quick to slow
ERROR = 0.05


class Forecast:
    """Of one non-negative quantity.

    Args:
        windows: how many windows ahead; at least 1.
    """

    def __init__(self, windows: int) -> None:
        self._windows = windows
        self._smoothers = [_Smoother(*gains, windows) for gains in GAINS]

    @property
    def level(self) -> float:
        """Its smoothed value; 0 before the first window."""
        return self._best.level

    @property
    def deviation(self) -> float:
        """Root mean square of the error so far ahead; 0 before there is one."""
        return math.sqrt(self._best.error)

    @property
    def is_proven(self) -> bool:
        """Whether as many forecasts as it looks ahead have come true or not."""
        return self._smoothers[0].num_errors >= self._windows

    def add(self, value: float) -> None:
        """The next window's value."""
        for smoother in self._smoothers:
            smoother.add(value)

    def ahead(self) -> float:
        """At the end of so many windows."""
        return self._best.ahead()

    def upper(self, deviations: float) -> float:
        """The most that it will be from now until then, with so many deviations of room."""
        return max(self.level, self.ahead()) + deviations * self.deviation

    @property
    def _best(self) -> _Smoother:
        """Of equals the quickest, as before there is any error."""
        return min(self._smoothers, key=lambda one: one.error)


class _Smoother:
    """One of them.

    Attributes:
        level: smoothed value.
        error: recent mean of the squared error of `ahead`, of which there were `num_errors`.
    """

    def __init__(self, level_gain: float, trend_gain: float, damping: float, windows: int) -> None:
        self.level = 0.0
        self.error = 0.0
        self._trend = 0.0
        self._gains = level_gain, trend_gain
        self._damping = damping
        self._steps = damping * (1 - math.pow(damping, windows)) / (1 - damping)
        self._said: deque[float] = deque()
        self._windows = windows
        self._num_windows = 0
        self.num_errors = 0

    def add(self, value: float) -> None:
        self._judge(value)
        self._num_windows += 1
        if self._num_windows == 1:
            self.level = value
        else:
            level_gain, trend_gain = self._gains
            expected = self.level + self._damping * self._trend
            error = value - expected
            self.level = max(expected + max(level_gain, 1 / self._num_windows) * error, 0.0)
            self._trend = self._damping * self._trend + trend_gain * error
        self._said.append(self.ahead())

    def ahead(self) -> float:
        return max(self.level + self._steps * self._trend, 0.0)

    def _judge(self, value: float) -> None:
        if len(self._said) < self._windows:
            return
        self.num_errors += 1
        error = value - self._said.popleft()
        self.error += max(ERROR, 1 / self.num_errors) * (error * error - self.error)
