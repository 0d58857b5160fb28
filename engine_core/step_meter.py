"""How long steps take, for cost models elsewhere: sums of what steps did, beside the seconds they took together.

Steps run one after another on the device and are read in the order of their dispatch. A step that is never read (a
prompt chunk that is not the last) is timed together with the next one that is. A step lasts from its dispatch, or from
the end of the one before it where that came later, to when its result is here. Owned by the engine thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from engine_core.batch import Chunk
from engine_core.messages import StepSums
from engine_core.sequence import Sequence as Seq

WARM_UP_SAMPLES = 3  # the first steps of a process page memory in and fill caches
MAX_SAMPLES = 32  # kept until somebody asks; later ones are dropped


@dataclass(frozen=True, slots=True)
class _Step:
    """A dispatched step; `counts` are the first six fields of StepSums."""

    dispatched_at: float
    num_compiles: int
    counts: tuple[int, int, int, int, int, int]


class StepMeter:
    """Times the steps of one replica.

    Args:
        clock: seconds, monotonic.
        num_compiles: compilations so far; a sample in which one fell is dropped.
    """

    def __init__(self, clock: Callable[[], float], num_compiles: Callable[[], int]) -> None:
        self._clock = clock
        self._num_compiles = num_compiles
        self._steps: deque[_Step] = deque()
        self._unread: list[_Step] = []
        self._ended_at = 0.0
        self._to_skip = WARM_UP_SAMPLES
        self._samples: list[StepSums] = []

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """A step over these chunks was dispatched."""
        tokens = sum(chunk.count for chunk in chunks)
        context = sum(chunk.count * chunk.start + chunk.count * (chunk.count + 1) // 2 for chunk in chunks)
        self._dispatched((1, tokens, context, 0, 0, 0))

    def decode(self, sequences: Sequence[Seq]) -> None:
        """A decode step was dispatched; each sequence has been advanced past its token."""
        self._dispatched((0, 0, 0, 1, len(sequences), sum(sequence.num_dispatched for sequence in sequences)))

    def not_read(self) -> None:
        """The oldest step's result is of no interest."""
        self._unread.append(self._steps.popleft())

    def read(self) -> None:
        """The oldest step's result is here."""
        steps = [*self._unread, self._steps.popleft()]
        self._unread.clear()
        now = self._clock()
        seconds = now - max(steps[0].dispatched_at, self._ended_at)
        self._ended_at = now
        if steps[0].num_compiles != self._num_compiles():
            return
        if self._to_skip:
            self._to_skip -= 1
        elif len(self._samples) < MAX_SAMPLES:
            totals: list[int] = [sum(column) for column in zip(*(step.counts for step in steps), strict=True)]
            self._samples.append(msgspec.convert([*totals, seconds], StepSums))

    def drain(self) -> list[StepSums]:
        """Take the samples since the last call."""
        samples, self._samples = self._samples, []
        return samples

    def _dispatched(self, counts: tuple[int, int, int, int, int, int]) -> None:
        self._steps.append(_Step(self._clock(), self._num_compiles(), counts))
