"""The slowest choices of the last minutes, and where they had been placed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from router.decision import Terms
from router.stream import Stream

KEPT = 2000  # choices that ended last, among which the slowest are looked for
SHOWN = 10


class EndedChoice(msgspec.Struct, frozen=True):
    """One choice that ended. Seconds; `ttft_s` is None where no token came.

    Attributes:
        at: seconds since 1970.
        prefill: None where the decode worker read the prompt.
        donor: None where nothing was fetched.
        terms: what placement compared when it chose the pair; None where it never did.
    """

    request_id: str
    at: float
    reason: str
    attempts: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    ttft_s: float | None
    e2e_s: float
    prefill: str | None
    decode: str | None
    donor: str | None
    terms: Terms | None


class SlowRequests:
    """Remembers what ended lately.

    Args:
        wall_clock: seconds since 1970.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._clock = wall_clock
        self._ended: deque[EndedChoice] = deque(maxlen=KEPT)

    def record(self, stream: Stream, reason: str, now: float) -> None:
        """A choice ended at `now` on the loop's clock."""
        route = stream.route
        entry = EndedChoice(
            request_id=stream.request.request_id,
            at=self._clock(),
            reason=reason,
            attempts=stream.journal.epoch + 1,
            prompt_tokens=stream.request.num_prompt_tokens,
            cached_tokens=stream.cached_tokens,
            generated_tokens=len(stream.journal.token_ids),
            ttft_s=stream.first_at - stream.arrived_at if stream.first_at else None,
            e2e_s=now - stream.arrived_at,
            prefill=route.prefill if route else None,
            decode=route.decode if route else None,
            donor=route.donor if route else None,
            terms=route.terms if route else None,
        )
        self._ended.append(entry)

    def slowest(self) -> list[EndedChoice]:
        """By time to first token, longest first; those that never got one come first of all."""
        return sorted(self._ended, key=_slowness, reverse=True)[:SHOWN]


def _slowness(entry: EndedChoice) -> float:
    return entry.e2e_s if entry.ttft_s is None else entry.ttft_s
