"""One choice of one HTTP request, from its first placement to its end."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

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


class Route(NamedTuple):
    """Where an attempt went, by worker id, and what placement compared when it chose; for people."""

    prefill: str | None
    decode: str
    terms: dict[str, float]


class Stream:
    """Mutable progress of one `Request`.

    Attributes:
        request: of the current attempt.
        index: which choice of the HTTP request.
        placement: None between two attempts and after the end.
        route: of the latest attempt, also after the end.
        avoid: workers that failed it.
        first_at, last_at: when its first and its latest token came; 0 before that.
    """

    __slots__ = (
        "arrived_at",
        "avoid",
        "cached_tokens",
        "ended",
        "first_at",
        "index",
        "journal",
        "last_at",
        "mailbox",
        "placement",
        "request",
        "route",
        "stage",
    )

    def __init__(self, request: Request, index: int, mailbox: Mailbox, arrived_at: float) -> None:
        self.request = request
        self.index = index
        self.mailbox = mailbox
        self.journal = Journal()
        self.placement: Placement | None = None
        self.route: Route | None = None
        self.stage = Stage.READING
        self.avoid: list[WorkerState] = []
        self.cached_tokens = 0
        self.arrived_at = arrived_at
        self.first_at = 0.0
        self.last_at = 0.0
        self.ended = False

    def attach(self, placement: Placement) -> None:
        """The attempt runs there."""
        self.placement = placement
        prefill = placement.prefill.info.worker_id if placement.prefill is not None else None
        self.route = Route(prefill, placement.decode.info.worker_id, placement.terms)
        self.stage = Stage.READING
        placement.decode.streams.add(self)
        if placement.prefill is not None:
            placement.prefill.streams.add(self)

    def advance(self) -> None:
        """A chunk of the current attempt came."""
        placement = self.placement
        if placement is None:
            return
        if self.stage is Stage.READING and placement.prefill is not None:
            self.stage = Stage.HANDING_OVER
            placement.release_prefill()
            return
        self.stage = Stage.DECODING
        if placement.prefill is not None:
            placement.prefill.streams.discard(self)

    def detach(self) -> list[WorkerState]:
        """The attempt is over: release what it reserved; return the workers that may still be at it."""
        placement, self.placement = self.placement, None
        if placement is None:
            return []
        placement.release()
        workers = [placement.decode]
        placement.decode.streams.discard(self)
        if placement.prefill is not None:
            placement.prefill.streams.discard(self)
            if self.stage is not Stage.DECODING:
                workers.append(placement.prefill)
        return workers
