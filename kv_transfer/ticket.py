"""Ticket: decode's landing reservation for one request's KV."""

from __future__ import annotations

import msgspec


def part_id(request_id: str, first_head: int) -> str:
    """The request id under which a host of a prefill worker hands KV heads from `first_head` on over."""
    return f"{request_id}#{first_head}" if first_head else request_id


class Landing(msgspec.Struct, frozen=True, array_like=True):
    """One reserved page.

    Attributes:
        block_index: which block of the prompt (0 is its first `page_size` tokens) belongs there.
        generation: of the page when it was reserved (`PagePool.generation`); it only grows, so that a frame meant for
            the page's former owner never matches.
    """

    block_index: int
    generation: int


class Ticket(msgspec.Struct, frozen=True):
    """Which blocks decode lacks, and where they may land.

    Attributes:
        serial: which ticket of this decode worker; it only grows. An answer to an earlier ticket is refused.
        landing: blocks wanted, each once; empty when decode holds the whole prompt and needs only the first token.
        lease_ms: without progress for that long, either side gives the request up.
    """

    request_id: str
    epoch: int
    serial: int
    landing: tuple[Landing, ...]
    lease_ms: int

    @property
    def key(self) -> tuple[str, int]:
        """(request_id, epoch): one attempt at one request."""
        return (self.request_id, self.epoch)
