"""One choice of one HTTP request, from its first placement to its end."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from engine_core.messages import TokenChunk
from engine_core.types import Request
from router.decision import Terms
from router.failures import FailureRecord
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
    donor: str | None
    terms: Terms


class Told(NamedTuple):
    """Stage times that a worker told with a chunk; see `TokenChunk.stage_s`."""

    worker: str
    at: float
    stage_s: tuple[float, ...]
    is_first: bool
    is_last: bool


class Attempt(NamedTuple):
    """One attempt, for traces. `prefill` is None where the decode worker read the prompt."""

    epoch: int
    sent_at: float
    prefill: str | None
    decode: str
    told: list[Told]


class Stream:
    """Mutable progress of one `Request`.

    Attributes:
        request: of the current attempt.
        index: which choice of the HTTP request.
        placement: None between two attempts and after the end; `prefill` and `decode` are its workers.
        donor: told to donate, and its blocks may still be wanted; None: there is none.
        may_fetch: whether its prefill worker may fetch blocks from a donor.
        route: of the latest attempt, also after the end.
        avoid: workers that failed it, by their keys.
        failures: what its failed attempts say of it.
        session: what the client calls its session.
        due: when the client wants the first token at the latest; None where it did not say.
        traceparent: of the client's trace, as W3C's header says it; empty where there is none.
        attempts: kept only where traces are wanted.
        sent_at: when its current attempt began.
        first_at, last_at: when its first and its latest token came; 0 before that.
    """

    __slots__ = (
        "arrived_at",
        "attempts",
        "avoid",
        "cached_tokens",
        "decode",
        "donor",
        "due",
        "ended",
        "failures",
        "first_at",
        "index",
        "journal",
        "last_at",
        "mailbox",
        "may_fetch",
        "placement",
        "prefill",
        "request",
        "route",
        "sent_at",
        "session",
        "stage",
        "traceparent",
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
        self.donor: WorkerState | None = None
        self.may_fetch = True
        self.route: Route | None = None
        self.stage = Stage.READING
        self.avoid: list[tuple[str, int]] = []
        self.failures = FailureRecord()
        self.cached_tokens = 0
        self.arrived_at = arrived_at
        self.sent_at = 0.0
        self.first_at = 0.0
        self.last_at = 0.0
        self.ended = False
        self.traceparent = ""
        self.attempts: list[Attempt] = []

    def attach(
        self, placement: Placement, prefill: WorkerState | None, decode: WorkerState, donor: WorkerState | None
    ) -> None:
        """The attempt runs there."""
        self.placement = placement
        self.prefill = prefill
        self.decode = decode
        self.donor = donor
        source = prefill.info.worker_id if prefill is not None else None
        giver = donor.info.worker_id if donor is not None else None
        self.route = Route(source, decode.info.worker_id, giver, placement.decision.chosen.terms)
        self.stage = Stage.READING
        decode.streams.add(self)
        if prefill is not None:
            prefill.streams.add(self)
        if donor is not None:
            donor.donations.add(self)

    def begin_attempt(self) -> None:
        """Remember it for the trace."""
        if self.route is not None:
            self.attempts.append(Attempt(self.journal.epoch, self.sent_at, self.route.prefill, self.route.decode, []))

    def heard_stages(self, chunk: TokenChunk, now: float) -> None:
        """A chunk that tells stage times came, before the stream advances by it."""
        if not self.attempts:
            return
        attempt = self.attempts[-1]
        worker = attempt.prefill if self.stage is Stage.READING and attempt.prefill else attempt.decode
        told = Told(worker, now, chunk.stage_s, self.stage is Stage.READING, chunk.finish_reason is not None)
        attempt.told.append(told)

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

    def dismiss_donor(self) -> WorkerState | None:
        """The prompt has been read, or never will be: whoever may still hold blocks for it, once."""
        donor, self.donor = self.donor, None
        if donor is not None:
            donor.donations.discard(self)
        return donor

    def detach(self, now: float) -> list[WorkerState]:
        """The attempt is over: release what it reserved; return the workers that may still be at it."""
        placement, self.placement = self.placement, None
        prefill, self.prefill = self.prefill, None
        decode, self.decode = self.decode, None
        donor = self.dismiss_donor()
        if placement is None or decode is None:
            return []
        placement.release(now)
        workers = [decode]
        decode.streams.discard(self)
        if prefill is not None:
            prefill.streams.discard(self)
            if self.stage is not Stage.DECODING:
                workers.append(prefill)
        if donor is not None and donor is not decode:
            workers.append(donor)
        return workers
