"""Whether a peer that should say something has been silent for too long."""

from __future__ import annotations


class Silence:
    """Counts our beats since a peer's last message: time in which this process itself was held up counts little.

    Attributes:
        limit: beats that it may last.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = 0

    def heard(self) -> None:
        """A message came."""
        self._count = 0

    def is_over(self) -> bool:
        """To be called at each of our beats: whether the peer has been silent for too long."""
        self._count += 1
        return self._count > self.limit
