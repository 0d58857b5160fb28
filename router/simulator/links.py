"""The network between workers: each interface sends and receives one thing at a time, at its full speed."""

from __future__ import annotations

from collections import defaultdict


class Links:
    """Of all workers.

    Args:
        bytes_per_s: of one interface, each way.

    Attributes:
        num_bytes: sent in all.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.num_bytes = 0
        self._bytes_per_s = bytes_per_s
        self._sending: defaultdict[str, float] = defaultdict(float)
        self._receiving: defaultdict[str, float] = defaultdict(float)

    def send(self, source: str, target: str, num_bytes: int, now: float) -> float:
        """Queue some bytes; returns when the last of them arrives, without the latency of a message."""
        start = max(now, self._sending[source], self._receiving[target])
        end = start + num_bytes / self._bytes_per_s
        self._sending[source] = self._receiving[target] = end
        self.num_bytes += num_bytes
        return end
