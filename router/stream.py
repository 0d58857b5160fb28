"""One choice of one HTTP request, from its first placement to its end."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from engine_core.types import Request
from router.journal import Journal
from router.mailbox import Mailbox

if TYPE_CHECKING:
    from router.placement import Placement
    from router.registry import WorkerState


class Stage(IntEnum):
    """How far the current attempt is."""

    READING = 0  # no token yet
    HANDING_OVER = 1  # the first token is here; the decode worker may still be fetching KV
    DECODING = 2  # the prefill worker is no longer needed


class Stream:
    """Mutable progress of one `Request`.

    Attributes:
        request: of the current attempt.
        index: which choice of the HTTP request.
        placement: None between two attempts and after the end; `prefill` and `decode` are its workers.
        avoid: workers that failed it, by their keys.
        session: what the client calls its session.
        due: when the client wants the first token at the latest; None where it did not say.
        sent_at: when its current attempt began.
        last_at: when its latest token came; 0 before the first.
    """

    __slots__ = (
        "arrived_at",
        "avoid",
        "cached_tokens",
        "decode",
        "due",
        "ended",
        "index",
        "journal",
        "last_at",
        "mailbox",
        "placement",
        "prefill",
        "request",
        "sent_at",
        "session",
        "stage",
    )

    def __init__(self, request: Request, index: int, mailbox: Mailbox, arrived_at: float, session: str | None) -> None:
        self.request = request
        self.index = index
        self.mailbox = mailbox
        self.journal = Journal()
        self.session = session
        self.due: float | None = None
        self.placement: Placement | None = None
        self.prefill: WorkerState | None = None
        self.decode: WorkerState | None = None
        self.stage = Stage.READING
        self.avoid: list[tuple[str, int]] = []
        self.cached_tokens = 0
        self.arrived_at = arrived_at
        self.sent_at = 0.0
        self.last_at = 0.0
        self.ended = False

    def attach(self, placement: Placement, prefill: WorkerState | None, decode: WorkerState) -> None:
        """The attempt runs there."""
        self.placement = placement
        self.prefill = prefill
        self.decode = decode
        self.stage = Stage.READING
        decode.streams.add(self)
        if prefill is not None:
            prefill.streams.add(self)

    def advance(self, now: float) -> None:
        """A chunk of the current attempt came."""
        placement = self.placement
        if placement is None:
            return
        if self.stage is Stage.READING:
            placement.release_prefill(now)
            if self.prefill is not None:
                self.stage = Stage.HANDING_OVER
                return
        self.stage = Stage.DECODING
        if self.prefill is not None:
            self.prefill.streams.discard(self)

    def detach(self, now: float) -> list[WorkerState]:
        """The attempt is over: release what it reserved; return the workers that may still be at it."""
        placement, self.placement = self.placement, None
        prefill, self.prefill = self.prefill, None
        decode, self.decode = self.decode, None
        if placement is None or decode is None:
            return []
        placement.release(now)
        workers = [decode]
        decode.streams.discard(self)
        if prefill is not None:
            prefill.streams.discard(self)
            if self.stage is not Stage.DECODING:
                workers.append(prefill)
        return workers
