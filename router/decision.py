"""Why a request went where it did: the terms of the choice and of those that came next, for people to read."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

MAX_DECISIONS = 4096


class Terms(msgspec.Struct, frozen=True, gc=False):
    """What a pair was predicted to cost, in seconds; the pair with the least sum wins.

    Attributes:
        queue_s: prompts before it.
        prefill_s: computing what the prefill worker does not hold.
        transfer_s: KV that arrives after prefill has ended.
        itl_s: what this sequence adds to its own and its neighbours' later steps; for local prefill, the neighbours'
            steps that it holds up, too.
        crowding_s: expected wait behind requests still to come, from how busy the prefill worker was lately.
        followers_s: what reading it adds to the waits of prompts still to come, at the fleet's recent utilization.
        affinity_s: negative where the session was here before.
        fetch_s: until the donor's blocks are there, beyond the prompts before it.
    """

    queue_s: float
    prefill_s: float
    transfer_s: float
    itl_s: float
    crowding_s: float
    followers_s: float
    affinity_s: float
    fetch_s: float

    @property
    def total_s(self) -> float:
        """The sum."""
        return (
            self.queue_s
            + self.prefill_s
            + self.transfer_s
            + self.itl_s
            + self.crowding_s
            + self.followers_s
            + self.affinity_s
            + self.fetch_s
        )

    @property
    def ttft_s(self) -> float:
        """Until the first token, as predicted."""
        return self.queue_s + self.fetch_s + self.prefill_s


class Option(msgspec.Struct, frozen=True, gc=False):
    """A pair that was weighed.

    Attributes:
        prefill: None where the decode worker would read the prompt.
        donor: whose blocks the prefill worker would fetch; None: nobody's.
        fetched_tokens: behind those that it holds.
    """

    prefill: str | None
    decode: str
    donor: str | None
    held_prefill_tokens: int
    held_decode_tokens: int
    fetched_tokens: int
    terms: Terms


class Decision(msgspec.Struct, frozen=True, gc=False):
    """One placement.

    Attributes:
        at: when, on the gateway's clock.
        num_tokens: of the prompt, with what earlier attempts generated.
        chosen: the winner.
        others: the next best that were weighed, best first.
        num_weighed: pairs, with a donor and without, whose cost was computed; the rest could not win.
        excluded: worker -> why it was not considered.
    """

    request_id: str
    epoch: int
    at: float
    num_tokens: int
    chosen: Option
    others: tuple[Option, ...]
    num_weighed: int
    excluded: dict[str, str]


class Decisions:
    """The last decisions, by request."""

    def __init__(self) -> None:
        self._by_request: OrderedDict[str, list[Decision]] = OrderedDict()

    def record(self, decision: Decision) -> None:
        """Keep one; the oldest requests are forgotten."""
        self._by_request.setdefault(decision.request_id, []).append(decision)
        if len(self._by_request) > MAX_DECISIONS:
            self._by_request.popitem(last=False)

    def of(self, request_id: str) -> list[Decision]:
        """All attempts of a request, in order; empty for one that is not known (any more)."""
        return self._by_request.get(request_id, [])
