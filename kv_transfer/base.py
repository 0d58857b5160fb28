"""The hand-off as workers see it: four Protocols.

`plane` is what workers use: it runs `sender` and `receiver` in a process beside the worker. Those two speak to other
hosts, by shared memory or TCP; `inproc` is the fake. One suite runs on all of them.

Life of one hand-off, (request_id, epoch) throughout:

    decode                                   prefill
    KvReceiver.request(address, ticket) ---> [waits for offer] <- KvSender.offer        at queue entry
                                             SenderEvents.on_ticket(ticket)
    ReceiverEvents.on_blocks   <------------ KvSender.send_blocks                        once per chunk
    ReceiverEvents.on_done     <------------ KvSender.finish(first token)
    or on_failed               <------------ KvSender.abort
    KvReceiver.cancel ---------------------> SenderEvents.on_cancel

A prefill worker that lacks a prompt's leading blocks fetches them from a donor (`donor`) in the same way: it is on the
left then, and the donor, of either role, on the right.

Ticket and offer may come in either order. After on_done, on_failed, on_cancel, cancel, abort or finish nothing is held
for that pair, and whatever still arrives for it is dropped.

Threads: every method of KvSender and KvReceiver may be called from any thread (workers: the engine thread) and never
blocks; calls of one thread keep their order. Every event fires on the event-loop thread and must return at once.
Arrays handed over belong to the transport: nobody may write to them afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from engine_core.errors import BatonError
from engine_core.messages import PeerAddress, TokenChunk
from kv_transfer.ticket import Ticket

Layers = Sequence[np.ndarray]
"""Per layer `[n, page_size, 2K, H]`, C-contiguous, of the layout's dtype or its bits."""


class KvSender(Protocol):
    """Prefill side."""

    @property
    def writable(self) -> bool:
        """Whether more blocks are welcome: False while `inflight_bytes` is at its limit. Any thread.

        A worker that sees False keeps the pages on the device and tries again, so that a slow receiver never makes it
        hold unbounded host memory. `send_blocks` never refuses.
        """
        ...

    @property
    def inflight_bytes(self) -> int:
        """Host memory held for blocks that decode may still need. Any thread."""
        ...

    async def wait_writable(self) -> None:
        """Wait, on the event loop, until `writable`."""
        ...

    def offer(self, request_id: str, epoch: int, lease_s: float) -> None:
        """The request is here: accept a ticket for it. `on_cancel` follows if it was cancelled before."""
        ...

    def send_blocks(self, request_id: str, epoch: int, block_indices: Sequence[int], layers: Layers) -> None:
        """Push those blocks among `block_indices` that the ticket names; hold them until there is a ticket."""
        ...

    def finish(self, request_id: str, epoch: int, first_token: TokenChunk) -> None:
        """All there are have been sent: follow them with the first token. Ends the hand-off.

        Blocks that the ticket names and that were not sent are lost. A donor gives an empty chunk: it has no token.
        """
        ...

    def abort(self, request_id: str, epoch: int, error: BatonError) -> None:
        """Give up, and tell decode why. Unknown ids are fine: a ticket that comes later is refused."""
        ...

    async def close(self) -> None:
        """Stop listening, drop everything."""
        ...


class SenderEvents(Protocol):
    """What the prefill worker hears."""

    def on_ticket(self, ticket: Ticket) -> None:
        """Decode wants `ticket.landing`; fires once the request is offered too."""
        ...

    def on_cancel(self, request_id: str, epoch: int, error: BatonError) -> None:
        """Decode gave up or is gone (RequestCancelled, TransferError), or no ticket came in time (TicketExpired)."""
        ...


class KvReceiver(Protocol):
    """Decode side."""

    def request(self, address: PeerAddress, ticket: Ticket) -> None:
        """Ask the prefill worker at `address` for the ticket's blocks; connects if need be."""
        ...

    def cancel(self, request_id: str, epoch: int) -> None:
        """No longer wanted; no event follows for blocks that have not been delivered. Unknown ids are fine."""
        ...

    async def close(self) -> None:
        """Close all connections; no event follows."""
        ...


class ReceiverEvents(Protocol):
    """What the decode worker hears."""

    def on_blocks(
        self, request_id: str, epoch: int, block_indices: Sequence[int], layers: Layers, generations: Sequence[int]
    ) -> None:
        """Verified blocks, in read-only memory that stays as it is for as long as anyone holds an array over it.

        Until then the sender keeps its copy and may have to wait: drop what has been used.

        Whoever scatters them later compares each generation with the page's own once more: between this call and the
        scatter the page may have got a new owner.
        """
        ...

    def on_done(self, request_id: str, epoch: int, first_token: TokenChunk, lost: Sequence[int]) -> None:
        """Every block of the ticket but those of `lost` has been delivered. Ends the hand-off.

        Decode continues behind `first_token`. Blocks that were damaged or late again and again, or that the sender no
        longer has, are lost: decode computes them itself.
        """
        ...

    def on_failed(self, request_id: str, epoch: int, error: BatonError) -> None:
        """The hand-off ended without its KV; nothing of it may be attended to. `error.retryable` as usual."""
        ...
