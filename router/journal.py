"""What one stream has generated so far, whichever worker said so."""

from __future__ import annotations

from engine_core.messages import TokenChunk

MAX_EARLY = 4096  # chunks that may wait for an earlier one


class Journal:
    """Accepts only the next position of the current epoch: duplicates and late tokens fall away, gaps cannot happen.

    The first token comes from the prefill worker and the rest from the decode worker, on different connections: a
    chunk that comes too early waits for its predecessor.

    Attributes:
        epoch: number of the current attempt.
        token_ids: everything generated, over all attempts.
        start: position at which the current attempt began.
        early: chunks that wait for an earlier one, by position.
    """

    __slots__ = ("early", "epoch", "start", "token_ids")

    def __init__(self) -> None:
        self.epoch = 0
        self.start = 0
        self.token_ids: list[int] = []
        self.early: dict[int, TokenChunk] = {}

    def accept(self, chunk: TokenChunk) -> bool:
        """Whether `chunk` is the next one; it is then part of the journal."""
        if chunk.epoch != self.epoch:
            return False
        if chunk.position != len(self.token_ids):
            self._keep(chunk)
            return False
        self.token_ids += chunk.token_ids
        return True

    def next_early(self) -> TokenChunk | None:
        """The chunk that came early and is due by now, if there is one; pass it to `accept`."""
        return self.early.pop(len(self.token_ids), None)

    def restart(self) -> int:
        """Begin the next attempt behind what was accepted; return its epoch."""
        self.epoch += 1
        self.start = len(self.token_ids)
        self.early.clear()
        return self.epoch

    def _keep(self, chunk: TokenChunk) -> None:
        if chunk.position < len(self.token_ids):
            return
        if len(self.early) < MAX_EARLY:
            self.early.setdefault(chunk.position, chunk)
