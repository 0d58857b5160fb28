"""A worker's cached blocks for prefill workers that lack them: a donor, of either role. Runs on the engine thread.

Life of a donation here:
    add -> leading blocks found in the prefix cache, their pages held -> offered under (request_id, epoch)
        -> ticket arrives: wanted blocks that are held leave the device, a portion between two steps, for the sender
        -> all of them handed over: finish, pages released; wanted blocks that are not held are lost
Pages are held until finish or cancel; the sender's lease cancels what no ticket comes for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine_core.errors import BatonError, TransferError
from engine_core.messages import Donate, TokenChunk
from engine_core.sequence import Sequence as Seq
from engine_core.sequence_memory import SequenceMemory
from kv_transfer.outlet import Outlet

Key = tuple[str, int]

LEASE_S = 5.0  # the fetch begins as soon as the prefill worker has read its message, or never
PORTION_PAGES = 16
PORTION_BYTES = 64 << 20  # copied between two steps, so that the inter-token latency of a decode worker holds
MAX_COPIES = 2  # portions on their way off the device


class PendingCopy(Protocol):
    """Pages on their way to the host."""

    def is_ready(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> list[np.ndarray]:
        """Per layer `[n, page_size, 2K, H]`."""


@dataclass(slots=True, eq=False)
class _Donation:
    """What is given under one (request_id, epoch).

    Attributes:
        sequence: holds the pages.
        wanted: block indices that the ticket names, that are held here, and that have not been copied; None before it.
        num_copies: portions on their way off the device.
    """

    sequence: Seq
    wanted: list[int] | None = None
    num_copies: int = 0

    @property
    def key(self) -> Key:
        """Under which it is given."""
        return self.sequence.key


class Donor:
    """Hands cached blocks over.

    Args:
        memory: where the prefix cache is.
        gather: begins to copy pages off the device, as they are after all steps dispatched so far.
        outlet: takes the blocks.
        block_bytes: of one block.
    """

    def __init__(
        self,
        memory: SequenceMemory,
        gather: Callable[[Sequence[int]], PendingCopy],
        outlet: Outlet,
        block_bytes: int,
    ) -> None:
        self._memory = memory
        self._gather = gather
        self._outlet = outlet
        self._portion = max(1, min(PORTION_PAGES, PORTION_BYTES // block_bytes))
        self._donations: dict[Key, _Donation] = {}
        self._copies: deque[tuple[_Donation, list[int], PendingCopy]] = deque()

    def __len__(self) -> int:
        """Donations that hold pages."""
        return len(self._donations)

    @property
    def is_giving(self) -> bool:
        """Whether somebody waits for blocks. Any thread."""
        return any(donation.wanted is not None for donation in list(self._donations.values()))

    def add(self, message: Donate) -> None:
        """Offer what is cached here of the prompt's leading blocks. A key that is already here is ignored."""
        sequence = Seq.of(message.request)
        if sequence.key in self._donations:
            return
        self._memory.hold_cached(sequence, message.num_blocks)
        if not sequence.pages:
            self._memory.release(sequence)
            self._outlet.sender.abort(*sequence.key, TransferError("no leading block of the prompt is cached here"))
            return
        self._donations[sequence.key] = _Donation(sequence)
        self._outlet.sender.offer(*sequence.key, min(LEASE_S, message.deadline_ms / 1000))

    def grant(self, key: Key, blocks: Sequence[int]) -> None:
        """A ticket arrived: these block indices, ascending, are wanted. Unknown keys are fine."""
        donation = self._donations.get(key)
        if donation is not None and donation.wanted is None:
            donation.wanted = [block for block in blocks if block < len(donation.sequence.pages)]
            self._finish_if_done(donation)

    def cancel(self, key: Key) -> None:
        """Nobody wants it any more: free what is held. Unknown keys are fine."""
        donation = self._donations.pop(key, None)
        if donation is not None:
            self._copies = deque(copy for copy in self._copies if copy[0] is not donation)
            self._memory.release(donation.sequence)

    def give_up(self, key: Key, error: BatonError) -> None:
        """Likewise, and tell who fetches. Unknown keys are fine."""
        if key in self._donations:
            self.cancel(key)
            self._outlet.sender.abort(*key, error)

    def tick(self, *, wait: bool) -> bool:
        """One round between two steps: begin to copy a portion, hand over one that is on the host.

        Args:
            wait: nothing else is to be done meanwhile.

        Returns:
            Whether another round should follow at once.
        """
        begun = self._begin_copy()
        return self._hand_over(wait=wait and not begun) or begun

    def _begin_copy(self) -> bool:
        donation = next((each for each in self._donations.values() if each.wanted), None)
        if donation is None or len(self._copies) == MAX_COPIES or not self._outlet.writable:
            return False
        if not self._memory.is_cached(donation.sequence):
            self.give_up(donation.key, TransferError("the blocks are not served any more: damaged ones were found"))
            return True
        assert donation.wanted is not None
        indices, donation.wanted = donation.wanted[: self._portion], donation.wanted[self._portion :]
        donation.num_copies += 1
        self._copies.append((donation, indices, self._gather([donation.sequence.pages[i] for i in indices])))
        return True

    def _hand_over(self, *, wait: bool) -> bool:
        if not self._copies or not (wait or self._copies[0][2].is_ready()):
            return False
        donation, indices, pages = self._copies.popleft()
        donation.num_copies -= 1
        self._outlet.sender.send_blocks(*donation.key, indices, pages.wait())
        self._finish_if_done(donation)
        return True

    def _finish_if_done(self, donation: _Donation) -> None:
        if donation.wanted == [] and not donation.num_copies:
            self.cancel(donation.key)
            self._outlet.sender.finish(*donation.key, TokenChunk(*donation.key, 0, []))
