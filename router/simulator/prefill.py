"""A simulated prefill worker: reads prompts chunk by chunk, tells the first token, pushes blocks under a ticket."""

from __future__ import annotations

import numpy as np

from engine_core.messages import StepSums, WorkerInfo
from router.simulator.chunks import Reading, Step
from router.simulator.job import Attempt
from router.simulator.profile import WorkerProfile
from router.simulator.worker import Place, Worker


class PrefillWorker(Worker):
    """Pages are held until the last block has been sent."""

    def __init__(self, place: Place, info: WorkerInfo, profile: WorkerProfile, rng: np.random.Generator) -> None:
        super().__init__(place, info, profile, rng)
        self._readings: dict[Attempt, Reading] = {}
        self._stepping = False

    @property
    def num_running(self) -> int:
        """Prompts that hold pages."""
        return len(self._readings) - self.readings.num_waiting

    @property
    def num_waiting(self) -> int:
        """Prompts that do not."""
        return self.readings.num_waiting

    def add(self, attempt: Attempt) -> None:
        """A prompt to read."""
        if not self.alive or attempt.over:
            return
        reading = Reading(attempt, attempt.num_tokens)
        self._readings[attempt] = reading
        self.fetches.begin(reading)
        self.readings.add(reading, first=False)
        self._kick()

    def grant(self, attempt: Attempt, first_block: int) -> None:
        """The target's ticket: blocks from this one on are wanted."""
        if not self.alive or attempt not in self._readings:
            return
        attempt.num_granted = first_block
        self._push(self._readings[attempt])

    def cancel(self, attempt: Attempt) -> None:
        """Free what the attempt holds. Unknown ones are fine."""
        self.fetches.cancel(attempt)
        reading = self._readings.pop(attempt, None)
        if reading is None:
            return
        self.readings.remove(attempt)
        self.memory.release(reading.pages)
        reading.pages = []
        self._kick()

    def crash(self) -> list[Attempt]:
        """Die; returns the attempts that are lost."""
        self.alive = False
        lost = list(self._readings)
        self._readings.clear()
        return lost

    def _kick(self) -> None:
        if self._stepping or not self.alive:
            return
        step = self.readings.next_step()
        if step is None:
            return
        self._stepping = True
        seconds = self._noisy(self.profile.chunk_s(step.num_tokens, step.num_pairs))
        self.busy_s += seconds
        self._sample(StepSums(1, step.num_tokens, step.num_pairs, 0, 0, 0, seconds))
        self._events.after(seconds, self._end_step, step)

    def _end_step(self, step: Step) -> None:
        self._stepping = False
        if not self.alive:
            return
        for reading, start, count in step.chunks:
            if reading.attempt not in self._readings:
                continue
            reading.num_computed = start + count
            if reading.num_computed == reading.num_tokens:
                reading.attempt.prefilled_at = self._events.now
                self._listener.on_first_token(reading.attempt, reading.num_cached)
            self._push(reading)
        self._kick()

    def _push(self, reading: Reading) -> None:
        """Send wanted blocks that are complete; behind the last one, the pages are free."""
        attempt = reading.attempt
        if attempt.num_granted < 0 or attempt.target is None:
            return
        is_read = reading.num_computed == reading.num_tokens
        total = self.memory.num_pages(reading.num_tokens)
        ready = total if is_read else reading.num_computed // self.memory.page_size
        first = max(attempt.num_granted, reading.num_sent)
        sent_at = self._events.now
        if ready > first:
            reading.num_sent = ready
            num_bytes = (ready - first) * self.info.block_bytes
            target = attempt.target.info.worker_id
            sent_at = self._links.send(self.info.worker_id, target, num_bytes, sent_at)
        if is_read:
            self._events.at(sent_at, self._handed_over, attempt)

    def _handed_over(self, attempt: Attempt) -> None:
        reading = self._readings.pop(attempt, None)
        if reading is None or not self.alive:
            return
        self.memory.release(reading.pages)
        assert attempt.target is not None
        self._events.after(self.profile.message_s, attempt.target.land, attempt)
        self._kick()
