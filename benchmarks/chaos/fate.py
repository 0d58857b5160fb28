"""What befalls a cluster in a chaos run, as its clients must know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Fate:
    """HTTP has no resumption: streams of a gateway that was killed break, and no others may.

    Attributes:
        latest: fault that began last.
        num_killed: gateways that were sent the signal.
        num_gone: of these, those that have ended since.
        num_frozen: times that a gateway was stopped.
        is_frozen: whether one is stopped now.
    """

    latest: str = ""
    num_killed: int = 0
    num_gone: int = 0
    num_frozen: int = 0
    is_frozen: bool = False

    def excuses(self, num_gone: int) -> bool:
        """Whether a stream may have broken that began when so many were gone: another one died since, or was dying."""
        return self.num_killed > num_gone
