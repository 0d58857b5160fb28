"""What a worker counts for operators: recorded where it happens, sent to gateways as one `WorkerStats` a second.

Every field has one writer, the engine thread or the event loop; readers see values that are at most a moment apart.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

from engine_core.messages import Distribution, LinkStats, WorkerStats
from engine_core.sequence import Sequence

STAGE_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Tally:
    """A histogram of seconds over `STAGE_BOUNDS`, since the start."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (len(STAGE_BOUNDS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """Count one value."""
        self._counts[bisect_left(STAGE_BOUNDS, seconds)] += 1
        self._total += seconds

    def snapshot(self) -> Distribution:
        """As it is now."""
        return Distribution(list(self._counts), self._total)


class _Link:
    """Hand-overs from one prefill worker."""

    __slots__ = ("failures", "num_bytes", "seconds", "transfers")

    def __init__(self) -> None:
        self.transfers = 0
        self.failures = 0
        self.num_bytes = 0
        self.seconds = 0.0


class StatsRecorder:
    """Counts for one worker.

    Args:
        device_memory: bytes used and bytes there, of the worker's devices together.

    Attributes:
        busy_s: seconds that the engine thread was at work.
        loop_lag_s: longest delay of the event loop since the last snapshot.
        refused: connections that were ended for what they said, by the error's code.
    """

    def __init__(self, device_memory: Callable[[], tuple[int, int]]) -> None:
        self.busy_s = 0.0
        self.loop_lag_s = 0.0
        self.refused: Counter[str] = Counter()
        self._device_memory = device_memory
        self._queue, self._prefill, self._transfer, self._decode = Tally(), Tally(), Tally(), Tally()
        self._prefill_steps = self._prefill_tokens = self._prefill_padding = 0
        self._decode_steps = self._decode_rows = self._decode_padding = 0
        self._query_tokens = self._hit_tokens = 0
        self._links: dict[str, _Link] = {}
        self._handing_over: dict[tuple[str, int], tuple[str, float]] = {}

    # On the engine thread.

    def prefill_step(self, num_tokens: int, bucket: int) -> None:
        """A step over `num_tokens` prompt tokens was dispatched, padded to `bucket`."""
        self._prefill_steps += 1
        self._prefill_tokens += num_tokens
        self._prefill_padding += bucket - num_tokens

    def decode_step(self, num_rows: int, bucket: int) -> None:
        """A step over `num_rows` sequences was dispatched, padded to `bucket`."""
        self._decode_steps += 1
        self._decode_rows += num_rows
        self._decode_padding += bucket - num_rows

    def admitted(self, sequence: Sequence) -> None:
        """The sequence has all its pages: its prefix was looked up, its computation or hand-over begins."""
        sequence.admitted_at = time.monotonic()
        self._queue.add(sequence.admitted_at - sequence.created_at)
        self._query_tokens += len(sequence.token_ids)
        self._hit_tokens += sequence.num_cached

    def prefilled(self, sequence: Sequence) -> None:
        """Its first token was read here."""
        sequence.decoding_at = time.monotonic()
        self._prefill.add(sequence.decoding_at - sequence.admitted_at)

    def decoding(self, sequence: Sequence) -> None:
        """It was prefilled elsewhere and has taken a slot."""
        sequence.decoding_at = time.monotonic()

    def preempted(self, sequence: Sequence) -> None:
        """It waits again; what it did before is not part of that wait."""
        sequence.created_at = time.monotonic()

    def finished(self, sequence: Sequence) -> None:
        """Its last token was read."""
        self._decode.add(time.monotonic() - sequence.decoding_at)

    # On either thread; a request's own calls come one after another.

    def hand_over_begins(self, key: tuple[str, int], source: str) -> None:
        """A ticket goes to the prefill worker at `source`, as host:port."""
        self._handing_over[key] = source, time.monotonic()

    def hand_over_received(self, key: tuple[str, int], num_bytes: int) -> None:
        """Verified KV arrived."""
        known = self._handing_over.get(key)
        if known is not None:
            self._link(known[0]).num_bytes += num_bytes

    def hand_over_ended(self, key: tuple[str, int], *, failed: bool) -> None:
        """All of it is here, or the attempt is over. Unknown keys are fine."""
        known = self._handing_over.pop(key, None)
        if known is None:
            return
        source, began_at = known
        link = self._link(source)
        if failed:
            link.failures += 1
            return
        seconds = time.monotonic() - began_at
        link.transfers += 1
        link.seconds += seconds
        self._transfer.add(seconds)

    def hand_over_cancelled(self, key: tuple[str, int]) -> None:
        """Nobody wants it any more; that is nobody's failure."""
        self._handing_over.pop(key, None)

    # On the event loop.

    def snapshot(self) -> WorkerStats:
        """Everything since the start; the longest loop delay since the last call."""
        used, limit = self._device_memory()
        lag, self.loop_lag_s = self.loop_lag_s, 0.0
        return WorkerStats(
            queue=self._queue.snapshot(),
            prefill=self._prefill.snapshot(),
            transfer=self._transfer.snapshot(),
            decode=self._decode.snapshot(),
            prefill_steps=self._prefill_steps,
            prefill_tokens=self._prefill_tokens,
            prefill_padding=self._prefill_padding,
            decode_steps=self._decode_steps,
            decode_rows=self._decode_rows,
            decode_padding=self._decode_padding,
            query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens,
            busy_s=self.busy_s,
            loop_lag_s=lag,
            memory_used_bytes=used,
            memory_limit_bytes=limit,
            refused=dict(self.refused),
            links={
                source: LinkStats(link.transfers, link.failures, link.num_bytes, link.seconds)
                for source, link in list(self._links.items())
            },
        )

    def _link(self, source: str) -> _Link:
        link = self._links.get(source)
        if link is None:
            link = self._links[source] = _Link()
        return link
