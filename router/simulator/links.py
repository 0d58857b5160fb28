"""The network between workers: each interface sends at its full speed and receives at its full speed.

What waits for a busy receiver does not keep its sender from sending to others: each pair has its own connection.
"""

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
        """Queue some bytes on either side; returns when the last of them arrives, without the latency of a message."""
        seconds = num_bytes / self._bytes_per_s
        sent_at = self._sending[source] = max(now, self._sending[source]) + seconds
        received_at = self._receiving[target] = max(now, self._receiving[target]) + seconds
        self.num_bytes += num_bytes
        return max(sent_at, received_at)
