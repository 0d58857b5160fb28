"""The choices of one HTTP request, as its endpoint sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING

from router.decision import Option
from router.mailbox import Item, Mailbox
from router.stream import Stream

if TYPE_CHECKING:
    from router.service import Service


class Generation:
    """The choices of one HTTP request. Close it on every path: that frees whatever the workers still hold."""

    def __init__(self, service: Service, streams: Sequence[Stream], mailbox: Mailbox) -> None:
        self._service = service
        self._streams = streams
        self._mailbox = mailbox

    def take(self, until_end: bool = False) -> Awaitable[list[Item]]:
        """Wait for chunks of any choice, or for one that ends a choice; take all that are here.

        Raises:
            BatonError: a choice ended without an answer; the others are of no use then.
        """
        return self._mailbox.take(until_end)

    def stop(self, index: int) -> None:
        """Enough of choice `index`: a stop string was found."""
        self._service.cancel(self._streams[index], "stop")

    def placed(self) -> Option | None:
        """Where the first choice runs, or ran last."""
        decisions = self._service.decisions.of(self._streams[0].request.request_id)
        return decisions[-1].chosen if decisions else None

    def cached_tokens(self, n: int) -> int:
        """Prompt tokens that were found in prefix caches, counted for one of the `n` choices of each prompt.

        What both workers of a choice hold counts once.
        """
        return sum(stream.cached_tokens for stream in self._streams[::n])

    def close(self) -> None:
        """Cancel what has not ended."""
        for stream in self._streams:
            self._service.cancel(stream, "cancelled")
