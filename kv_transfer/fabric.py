"""Ways from device to device, as the endpoints see them; `engine_core.device_fabric` implements them.

A sender registers arrays under a number, tells the number on its KV connection, and the receiver pulls them. Whoever
reaches the port and knows a number gets its arrays: numbers are random, and travel on authenticated connections only.
Neither end's host sees the bytes, so both digest them on their devices, by another sum than `kv_transfer.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kv_transfer.base import Layers
from kv_transfer.layout import BlockLayout


class Pulled(Protocol):
    """Blocks that have come."""

    @property
    def layers(self) -> Layers:
        """Per layer `[n, page_size, 2K, H]`, read-only; their memory is theirs alone."""
        ...

    @property
    def digests(self) -> tuple[int, ...]:
        """One per block, of what has landed."""
        ...


class DevicePeer(Protocol):
    """A receiver's way to one sender, for one session."""

    def pull(self, number: int, n: int, layout: BlockLayout, on_done: Callable[[Pulled | Exception], None]) -> None:
        """Fetch n blocks; never waits. Pulls of one peer run in order.

        A pull may hang for ever, when the sender does or never registered the number: the caller keeps the deadline.

        Args:
            number: named by the sender.
            n: blocks.
            layout: agreed on when the session began: the transport itself takes any bytes for any dtype.
            on_done: called on a thread of the peer's; not at all if the pull hangs.
        """
        ...

    def close(self) -> None:
        """No more pulls; one that hangs is left behind."""
        ...


class DeviceFabric(Protocol):
    """One process's end."""

    @property
    def address(self) -> str:
        """Where peers pull from."""
        ...

    def offer(self, layers: Layers) -> tuple[int, tuple[int, ...]]:
        """Register blocks, to be pulled once: their number, at least 1, and a digest of each.

        Args:
            layers: per layer `[n, page_size, 2K, H]`; nobody writes to them afterwards.
        """
        ...

    def pulled(self, numbers: Sequence[int]) -> None:
        """The receiver has these."""
        ...

    def withdraw(self, numbers: Sequence[int]) -> None:
        """Free what was offered under these numbers and will not be pulled; those that were pulled are fine."""
        ...

    def connect(self, address: str) -> DevicePeer:
        """A way to the process there."""
        ...
