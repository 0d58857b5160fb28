"""Where the connections to workers leave chunks for the task that serves an HTTP request."""

from __future__ import annotations

import asyncio

from engine_core.errors import BatonError
from engine_core.messages import TokenChunk

Item = tuple[int, TokenChunk]


def joined(items: list[Item]) -> list[Item]:
    """All chunks of a choice as one, in the order in which the choices first appear."""
    of_choice: dict[int, list[TokenChunk]] = {}
    for index, chunk in items:
        of_choice.setdefault(index, []).append(chunk)
    return [(index, _join(chunks)) for index, chunks in of_choice.items()]


def _join(chunks: list[TokenChunk]) -> TokenChunk:
    first = chunks[0]
    return TokenChunk(
        first.request_id,
        first.epoch,
        first.position,
        [token_id for chunk in chunks for token_id in chunk.token_ids],
        chunks[-1].finish_reason,
        [entry for chunk in chunks for entry in chunk.logprobs],
        first.cached_tokens,
        first.prompt_logprobs,
    )


class Mailbox:
    """A queue with one reader, who takes all there is at once: many chunks cost one task switch.

    Args:
        loop: that the reader runs on.
    """

    __slots__ = ("_error", "_has_end", "_items", "_loop", "_until_end", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: list[Item] = []
        self._has_end = False  # among the items
        self._until_end = False  # what the reader waits for
        self._error: BatonError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, chunk: TokenChunk) -> None:
        """Leave a chunk of choice `index`."""
        self._items.append((index, chunk))
        if chunk.finish_reason is not None:
            self._has_end = True
        if self._has_end or not self._until_end:
            self._wake()

    def fail(self, error: BatonError) -> None:
        """Raise `error` in the reader once it has taken what came before."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # done: the reader was cancelled, and has not run since
            waiter.set_result(None)

    async def take(self, until_end: bool = False) -> list[Item]:
        """Wait for chunks; take them all, in the order of arrival.

        Args:
            until_end: wait for one that ends a choice. Who needs nothing sooner is not woken for every token.
        """
        self._until_end = until_end
        while not self._items or (until_end and not self._has_end):
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        self._has_end = False
        return items
