"""The last minutes of one gateway, for people who have no Prometheus: rates and latencies at regular moments."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from router.metrics import Metrics

INTERVAL_S = 2.0
POINTS = 300  # kept: ten minutes
WINDOW = 5  # intervals over which rates and latencies are taken


class Point(msgspec.Struct, frozen=True):
    """One moment. Latencies are None where nothing was measured in the window.

    Attributes:
        at: seconds since 1970.
        requests: choices that ended, per second; `goodput` of them within both objectives.
        tokens: generated, per second.
    """

    at: float
    running: int
    requests: float
    goodput: float
    tokens: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None


class _Totals(msgspec.Struct, frozen=True):
    at: float
    ended: int
    within: int
    tokens: int
    ttft: list[int]
    itl: list[int]


class History:
    """Samples the counters of a gateway.

    Args:
        wall_clock: seconds since 1970.
    """

    def __init__(self, metrics: Metrics, wall_clock: Callable[[], float]) -> None:
        self.points: deque[Point] = deque(maxlen=POINTS)
        self._metrics = metrics
        self._clock = wall_clock
        self._totals: deque[_Totals] = deque([self._now()], maxlen=WINDOW)

    async def watch(self) -> None:
        """Sample for ever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            self.sample()

    def sample(self) -> None:
        """Add one point."""
        before, now = self._totals[0], self._now()
        self._totals.append(now)
        seconds = max(now.at - before.at, 1e-3)
        ttft, itl = self._metrics.ttft, self._metrics.itl
        ttft_counts = [new - old for new, old in zip(now.ttft, before.ttft, strict=True)]
        itl_counts = [new - old for new, old in zip(now.itl, before.itl, strict=True)]
        point = Point(
            at=now.at,
            running=self._metrics.running_streams,
            requests=(now.ended - before.ended) / seconds,
            goodput=(now.within - before.within) / seconds,
            tokens=(now.tokens - before.tokens) / seconds,
            ttft_p50_s=bucket_quantile(0.5, ttft.bounds, ttft_counts),
            ttft_p99_s=bucket_quantile(0.99, ttft.bounds, ttft_counts),
            itl_p50_s=bucket_quantile(0.5, itl.bounds, itl_counts),
            itl_p99_s=bucket_quantile(0.99, itl.bounds, itl_counts),
        )
        self.points.append(point)

    def _now(self) -> _Totals:
        metrics = self._metrics
        return _Totals(
            at=self._clock(),
            ended=sum(metrics.choices.values()),
            within=metrics.within_slo,
            tokens=metrics.generated_tokens,
            ttft=metrics.ttft.counts,
            itl=metrics.itl.counts,
        )


def bucket_quantile(share: float, bounds: Sequence[float], counts: Sequence[int]) -> float | None:
    """Of values counted per bucket, interpolated within the bucket as Prometheus's `histogram_quantile` does."""
    rank = share * sum(counts)
    if not rank:
        return None
    seen = 0
    for index, count in enumerate(counts):
        if seen + count >= rank and count:
            if index == len(bounds):
                return bounds[-1]
            low = bounds[index - 1] if index else 0.0
            return low + (bounds[index] - low) * (rank - seen) / count
        seen += count
    return bounds[-1]
