"""A simulated decode worker: continuous batching, landing, local prefill, preemption.

Steps whose batch does not change are played as one *stretch* in closed form: a step takes longer than the one before it
by the same amount each time, as every row gains a token. A stretch ends where a row is finished or needs a page, or at
the next step boundary once something else is to be done. While prompts are read here, every stretch is one round: a
chunk, then a decode step.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from engine_core.errors import NoFreePages
from engine_core.messages import StepSums, WorkerInfo
from router.simulator.chunks import Reading, Step
from router.simulator.job import Attempt
from router.simulator.profile import WorkerProfile
from router.simulator.worker import Place, Worker

PATIENCE_S = 10.0  # as in `decode_worker.scheduler`


@dataclass(slots=True, eq=False)
class _Row:
    """A sequence that holds pages for decoding.

    Attributes:
        num_tokens: in the cache when it joined the batch.
        joined_at: number of the first step that it took part in; -1 before.
        left: tokens to generate from then on.
        told_at: when its latest token before that step was produced.
    """

    attempt: Attempt
    pages: list[int]
    num_tokens: int
    left: int
    told_at: float
    joined_at: int = -1


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Steps under way, all with the same rows: the first takes `first_s`, each one after it `growth_s` more."""

    begun_at: float
    num_steps: int
    num_rows: int
    kv_tokens: int
    first_s: float
    growth_s: float
    chunks: Step | None
    joined: list[_Row]

    def seconds(self, num_steps: int) -> float:
        """Of the first steps."""
        return num_steps * self.first_s + self.growth_s * num_steps * (num_steps - 1) / 2

    def steps_by(self, seconds: float) -> int:
        """The fewest steps that last at least so long, at least one and at most all."""
        if self.growth_s <= 0:
            count = seconds / self.first_s
        else:
            half = self.first_s / self.growth_s - 0.5
            count = math.sqrt(half * half + 2 * seconds / self.growth_s) - half
        return min(max(math.ceil(count - 1e-9), 1), self.num_steps)


class DecodeWorker(Worker):
    """See the module."""

    def __init__(self, place: Place, info: WorkerInfo, profile: WorkerProfile, rng: np.random.Generator) -> None:
        super().__init__(place, info, profile, rng)
        self._to_reserve: deque[Attempt] = deque()
        self._landing: dict[Attempt, tuple[list[int], int]] = {}  # pages, and how many blocks of them are cached
        self._ready: deque[_Row] = deque()
        self._rows: dict[Attempt, _Row] = {}  # the oldest first
        self._readings: dict[Attempt, Reading] = {}
        self._due: list[tuple[int, int, _Row]] = []  # step, order, row
        self._num_due = 0
        self._full: list[_Row] = []  # have no page for their next token
        self._doomed: list[_Row] = []  # cancelled during a step
        self._num_steps = 0
        self._kv_tokens = 0
        self._stretch: _Stretch | None = None
        self._version = 0

    @property
    def num_running(self) -> int:
        """Rows of the batch."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not decode yet."""
        return len(self._to_reserve) + len(self._landing) + len(self._ready) + len(self._readings)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the next step attends to."""
        return self._kv_tokens

    # what others ask

    def add(self, attempt: Attempt) -> None:
        """A request: its prompt is read by `attempt.source`, or here."""
        if not self.alive or attempt.over:
            return
        attempt.came_at = self._events.now
        if attempt.source is None:
            reading = Reading(attempt, attempt.num_tokens)
            self._readings[attempt] = reading
            self.readings.add(reading, first=False)
        else:
            self._to_reserve.append(attempt)
        self._kick()

    def land(self, attempt: Attempt) -> None:
        """All its KV is here."""
        if not self.alive or attempt.over:
            return
        pages, num_stored = self._landing.pop(attempt)  # KeyError: landed twice
        self.memory.store(attempt.job.hashes, pages, num_stored, attempt.num_tokens)
        row = _Row(attempt, pages, attempt.num_tokens, attempt.left - 1, attempt.prefilled_at)
        if row.left:
            self._ready.append(row)
        else:
            self._finish(row)
        self._kick()

    def cancel(self, attempt: Attempt) -> None:
        """Free what the attempt holds. Unknown ones are fine."""
        if attempt in self._to_reserve:
            self._to_reserve.remove(attempt)
        if attempt in self._landing:
            self.memory.release(self._landing.pop(attempt)[0])
        if attempt in self._readings:
            reading = self._readings.pop(attempt)
            self.readings.remove(attempt)
            self.memory.release(reading.pages)
            reading.pages = []
        for row in [one for one in self._ready if one.attempt is attempt]:
            self._ready.remove(row)
            self.memory.release(row.pages)
        running = self._rows.get(attempt)
        if running is not None:
            self._doomed.append(running)
        self._kick()

    def crash(self) -> list[Attempt]:
        """Die; returns the attempts that are lost; their jobs have the tokens of all whole steps."""
        self._settle()
        self.alive = False
        for row in [*self._ready, *self._rows.values()]:
            done = self._num_generated(row) if row.joined_at >= 0 else 0
            row.attempt.job.generated = row.attempt.job.num_output - row.left + done
        return [
            *self._to_reserve,
            *self._landing,
            *self._readings,
            *(row.attempt for row in self._ready),
            *self._rows,
        ]

    # time

    def _kick(self) -> None:
        """Something may be done at the next step boundary."""
        if not self.alive:
            return
        stretch = self._stretch
        if stretch is None:
            self._begin()
            return
        count = stretch.steps_by(self._events.now - stretch.begun_at)
        if count < stretch.num_steps:
            self._end_after(count)

    def _end_after(self, num_steps: int) -> None:
        stretch = self._stretch
        assert stretch is not None
        self._stretch = _Stretch(
            stretch.begun_at,
            num_steps,
            stretch.num_rows,
            stretch.kv_tokens,
            stretch.first_s,
            stretch.growth_s,
            stretch.chunks,
            stretch.joined,
        )
        self._version += 1
        self._events.at(stretch.begun_at + stretch.seconds(num_steps), self._end, self._version)

    def _begin(self) -> None:
        """At a step boundary, with nothing under way."""
        self._reserve_landings()
        joined = self._admit()
        self._grow_rows()
        step = self.readings.next_step()
        num_rows = len(self._rows)
        if step is None and not num_rows:
            return
        profile = self.profile
        chunk_s = profile.chunk_s(step.num_tokens, step.num_pairs) if step is not None else 0.0
        decode_s = profile.decode_s(num_rows, self._kv_tokens + num_rows) if num_rows else 0.0
        factor = self._noisy(1.0)
        num_steps = 1 if step is not None else self._due[0][0] - self._num_steps
        growth_s = profile.decode_token_s * num_rows * factor
        self._stretch = _Stretch(
            self._events.now,
            num_steps,
            num_rows,
            self._kv_tokens,
            (chunk_s + decode_s) * factor,
            growth_s,
            step,
            [row for row in joined if row.attempt in self._rows],
        )
        self._end_after(num_steps)

    def _end(self, version: int) -> None:
        if version != self._version or not self.alive:
            return
        stretch = self._stretch
        assert stretch is not None
        self._stretch = None
        self._count(stretch, stretch.num_steps)
        for row in self._doomed:
            if self._rows.get(row.attempt) is row:
                self._leave(row)
        self._doomed.clear()
        while self._due and self._due[0][0] <= self._num_steps:
            row = heapq.heappop(self._due)[2]
            if self._rows.get(row.attempt) is not row:
                continue
            if self._num_generated(row) >= row.left:
                self._leave(row)
                self._finish(row)
            else:
                self._full.append(row)
        if stretch.chunks is not None:
            self._end_chunks(stretch.chunks)
        self._begin()

    def _settle(self) -> None:
        """A crash: count the steps that are complete."""
        stretch = self._stretch
        if stretch is None:
            return
        elapsed = self._events.now - stretch.begun_at
        count = stretch.steps_by(elapsed)
        while count and stretch.seconds(count) > elapsed:
            count -= 1
        if count:
            self._count(stretch, count)

    def _count(self, stretch: _Stretch, num_steps: int) -> None:
        seconds = stretch.seconds(num_steps)
        self.busy_s += seconds
        chunks, rows = stretch.chunks, stretch.num_rows
        context = num_steps * stretch.kv_tokens + rows * num_steps * (num_steps + 1) // 2
        self._sample(
            StepSums(
                1 if chunks else 0,
                chunks.num_tokens if chunks else 0,
                chunks.num_pairs if chunks else 0,
                num_steps if rows else 0,
                rows * num_steps,
                context if rows else 0,
                seconds,
            )
        )
        if not rows:
            return
        last_s = stretch.first_s + stretch.growth_s * (num_steps - 1)
        self._listener.on_steps(rows, stretch.first_s, last_s, num_steps)
        for row in stretch.joined:  # its first gap is the one since its last token, not this step
            gap_s = stretch.begun_at + stretch.first_s - row.told_at
            self._listener.on_steps(1, gap_s, gap_s, 1)
            self._listener.on_steps(-1, stretch.first_s, stretch.first_s, 1)
            if row.left == row.attempt.left - 1:
                self._listener.on_second_token(row.attempt, gap_s)
        self._num_steps += num_steps
        self._kv_tokens += rows * num_steps

    # sequences

    def _reserve_landings(self) -> None:
        self._reserve_what_may_land()
        self.readings.before = math.inf
        if self._to_reserve and self._rows:
            came_at = self._to_reserve[0].came_at
            if self._events.now - came_at > PATIENCE_S:
                self.readings.before = came_at

    def _reserve_what_may_land(self) -> None:
        starved = self.readings.starved if self._rows else None
        while self._to_reserve:
            attempt = self._to_reserve[0]
            if starved is not None and starved.attempt.came_at < attempt.came_at:  # running rows will leave pages
                return
            reserved = self.memory.reserve(attempt.job.hashes, attempt.num_tokens, attempt.num_tokens)
            if reserved is None:
                return
            self._to_reserve.popleft()
            self._landing[attempt] = reserved
            assert attempt.source is not None
            self._events.after(self.profile.message_s, attempt.source.grant, attempt, reserved[1])

    def _admit(self) -> list[_Row]:
        joined = []
        while self._ready and len(self._rows) < self.profile.num_slots:
            row = self._ready.popleft()
            self._join(row)
            joined.append(row)
        return joined

    def _join(self, row: _Row) -> None:
        row.joined_at = self._num_steps
        self._rows[row.attempt] = row
        self._kv_tokens += row.num_tokens
        self._schedule(row)

    def _schedule(self, row: _Row) -> None:
        """When it needs attention: at its end, or where its pages are full."""
        room = len(row.pages) * self.memory.page_size - row.num_tokens
        if room <= self._num_generated(row):
            self._full.append(row)
            return
        self._num_due += 1
        heapq.heappush(self._due, (row.joined_at + min(row.left, room), self._num_due, row))

    def _grow_rows(self) -> None:
        """A page for each row that has none for its next token; the youngest make room."""
        full, self._full = self._full, []
        for row in full:
            while self._rows.get(row.attempt) is row:
                try:
                    row.pages += self.memory.cache.allocate(1)
                except NoFreePages:
                    self._preempt()
                else:
                    self._schedule(row)
                    break
        while self._due and self._rows.get(self._due[0][2].attempt) is not self._due[0][2]:
            heapq.heappop(self._due)

    def _preempt(self) -> None:
        """The youngest gives its pages back, and all that it has is computed again here."""
        row = next(reversed(self._rows.values()))
        generated = self._num_generated(row)
        self._leave(row)
        self.num_preemptions += 1
        reading = Reading(row.attempt, row.num_tokens + generated)
        reading.resumed = (row.left - generated, self._events.now)
        self._readings[row.attempt] = reading
        self.readings.add(reading, first=True)

    def _end_chunks(self, step: Step) -> None:
        for reading, start, count in step.chunks:
            attempt = reading.attempt
            if self._readings.get(attempt) is not reading:
                continue
            reading.num_computed = start + count
            if reading.num_computed < reading.num_tokens:
                continue
            del self._readings[attempt]
            now = self._events.now
            if reading.resumed is None:
                attempt.prefilled_at = now
                self._listener.on_first_token(attempt, reading.num_cached)
                row = _Row(attempt, reading.pages, reading.num_tokens, attempt.left - 1, now)
            else:
                left, told_at = reading.resumed
                row = _Row(attempt, reading.pages, reading.num_tokens, left, told_at)
            if row.left:
                self._ready.append(row)
            else:
                self._finish(row)

    def _num_generated(self, row: _Row) -> int:
        return self._num_steps - row.joined_at

    def _leave(self, row: _Row) -> None:
        """Take it out of the batch, and its pages from it."""
        del self._rows[row.attempt]
        self._kv_tokens -= row.num_tokens + self._num_generated(row)
        self.memory.release(row.pages)
        row.pages = []

    def _finish(self, row: _Row) -> None:
        if row.pages:
            self.memory.release(row.pages)
            row.pages = []
        self._listener.on_finished(row.attempt)
