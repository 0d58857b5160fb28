"""What one gateway tells the autoscaler: totals since its start; a window is the difference of two."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from router.candidate import Candidate
from router.planner import MAX_SERVICES
from router.pool_model import DecodeCosts, mean_costs
from router.stream import Stream


class LoadTotals(msgspec.Struct, frozen=True):
    """Counted since the gateway's start, at one moment.

    Attributes:
        at: of the gateway's own clock, seconds.
        arrived: choices that clients asked for.
        refused: of these, turned away for want of room.
        first_tokens, first_in_time: choices that got their first token, and those of them that got it in time.
        late: choices that wait for their first token now, longer than they should.
        ended, itl_met: choices that came to their end, and those of them whose tokens came quickly enough.
        output_tokens: of the choices that ended.
        attended_tokens: over these tokens, about how many tokens each attended to.
        transfer_s: how long the KV of all hand-overs kept a network busy, as learned.
        service_s: prefill seconds of the latest prompts since the last reading, without what caches held.
        decode: what decode steps take; None until enough of them were measured.
    """

    at: float
    arrived: int
    refused: int
    first_tokens: int
    first_in_time: int
    late: int
    ended: int
    itl_met: int
    output_tokens: int
    attended_tokens: float
    transfer_s: float
    service_s: tuple[float, ...]
    decode: DecodeCosts | None


class LoadMeter:
    """Counts for `LoadTotals`.

    Args:
        ttft_s, itl_s: the objectives.
    """

    def __init__(self, ttft_s: float, itl_s: float) -> None:
        self._ttft_s, self._itl_s = ttft_s, itl_s
        self._arrived = 0
        self._first_tokens = self._first_in_time = 0
        self._ended = self._itl_met = 0
        self._output_tokens = 0
        self._attended = 0.0
        self._transfer_s = 0.0
        self._service_s: deque[float] = deque(maxlen=MAX_SERVICES)

    def arrived(self, count: int) -> None:
        """Clients asked for so many choices."""
        self._arrived += count

    def placed(self, prefill_s: float, transfer_s: float) -> None:
        """A choice was placed for the first time; what it will take, as predicted."""
        if prefill_s:
            self._service_s.append(prefill_s)
        self._transfer_s += transfer_s

    def first_token(self, seconds: float) -> None:
        """A choice got its first token so long after its arrival."""
        self._first_tokens += 1
        self._first_in_time += seconds <= self._ttft_s

    def ended(self, stream: Stream) -> None:
        """A choice came to its end, other than by a client that left."""
        count = len(stream.journal.token_ids)
        if not count:
            return
        self._ended += 1
        self._itl_met += (stream.last_at - stream.first_at) / max(count - 1, 1) <= self._itl_s
        self._output_tokens += count
        self._attended += (stream.request.num_prompt_tokens + count / 2) * count

    def read(
        self, now: float, streams: Iterable[Stream], refused: int, decode_workers: Sequence[Candidate]
    ) -> LoadTotals:
        """The totals of this moment.

        Args:
            streams: in progress, in the order of their arrival.
        """
        late = 0
        for stream in streams:
            if stream.arrived_at > now - self._ttft_s:
                break
            late += not stream.first_at
        costs = [worker.decode_costs() for worker in decode_workers if worker.steps.is_trusted]
        totals = LoadTotals(
            at=now,
            arrived=self._arrived,
            refused=refused,
            first_tokens=self._first_tokens,
            first_in_time=self._first_in_time,
            late=late,
            ended=self._ended,
            itl_met=self._itl_met,
            output_tokens=self._output_tokens,
            attended_tokens=self._attended,
            transfer_s=self._transfer_s,
            service_s=tuple(self._service_s),
            decode=mean_costs(costs) if costs else None,
        )
        self._service_s.clear()
        return totals
