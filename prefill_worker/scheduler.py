"""The prefill role's scheduler: chunks in, blocks and first tokens out. Runs on the engine thread.

Life of a sequence here:
    add -> (queue; meanwhile leading blocks may be fetched from a donor, and others go before it)
        -> chunks dispatched -> first token read -> told to the gateway
        -> ticket arrives at any time: wanted blocks are gathered as soon as the step that fills them, or the
           write of what was fetched, is dispatched
        -> all wanted blocks handed to the sender and the first token known: finish, pages released
Pages are held from admission until finish or cancel; the KV sender's lease cancels what no ticket comes for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engine_core.batch import Chunk
from engine_core.chunking import ChunkQueue
from engine_core.engine import PendingPages, PendingStep
from engine_core.errors import BatonError, NotFinite
from engine_core.host_commands import Export
from engine_core.messages import PeerAddress, StepSums, TokenChunk
from engine_core.replica import Replica
from engine_core.sequence import Sequence as Seq
from engine_core.step_meter import StepMeter
from engine_core.types import Request
from prefill_worker.fetches import Fetches, Source

Key = tuple[str, int]


class PrefillEvents(Protocol):
    """What the scheduler tells its worker; called on the engine thread."""

    @property
    def writable(self) -> bool:
        """Whether more blocks are welcome; else pages stay on the device."""

    def fetch(self, key: Key, donor: PeerAddress, wanted: list[tuple[int, int]]) -> None:
        """Pages are reserved: ask `donor` for these (block index, page generation). If for none: it is free to go."""

    def fetch_abandoned(self, key: Key) -> None:
        """They are wanted no more."""

    def tokens(self, chunk: TokenChunk) -> None:
        """The first token, for the gateway."""

    def blocks(self, key: Key, indices: list[int], layers: list[np.ndarray]) -> None:
        """Blocks for the decode worker; per layer `[n, page_size, 2K, H]`."""

    def failed(self, key: Key, error: BatonError) -> None:
        """The sequence is gone."""

    def finished(self, key: Key, first_token: TokenChunk) -> None:
        """All wanted blocks have been handed over."""


@dataclass(slots=True, eq=False)
class _Task:
    """A sequence and its hand-over.

    Attributes:
        wanted: block indices that the ticket names and that have not been gathered; None before the ticket.
        gathers: blocks on their way off the device.
        first_token: what the gateway was told.
    """

    sequence: Seq
    wanted: list[int] | None = None
    gathers: deque[tuple[list[int], PendingPages]] = field(default_factory=deque)
    first_token: TokenChunk | None = None


class PrefillScheduler:
    """Chunked prefill over one replica.

    Args:
        replica: engine and host state.
        events: where results go.
        clock: seconds, monotonic.
    """

    def __init__(self, replica: Replica, events: PrefillEvents, clock: Callable[[], float] = time.monotonic) -> None:
        self._replica = replica
        self._events = events
        self._queue = ChunkQueue(replica.memory)
        self._fetches = Fetches(replica.memory, replica.engine, clock)
        self._tasks: dict[Key, _Task] = {}
        self._inflight: deque[tuple[PendingStep, list[int], list[Chunk]]] = deque()
        self._eos = frozenset(replica.resolved.spec.eos_token_ids)
        self._meter = StepMeter(clock, lambda: replica.compiles_after_warmup)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._tasks) - self._queue.num_waiting

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for pages."""
        return self._queue.num_waiting

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens still to be computed."""
        return self._queue.queued_tokens

    @property
    def num_preemptions(self) -> int:
        """A prompt's pages are reserved as a whole: nothing is ever preempted."""
        return 0

    def drain_samples(self) -> list[StepSums]:
        """How long steps took since the last call."""
        return self._meter.drain()

    def add(self, request: Request, source: Source | None = None) -> None:
        """Take a prompt, whose leading blocks `source` may have. A key that is already here is ignored: a duplicate."""
        sequence = Seq.of(request)
        if sequence.key in self._tasks:
            return
        self._tasks[sequence.key] = _Task(sequence)
        self._queue.add(sequence)
        if source is not None:
            wanted = self._fetches.begin(sequence, source)
            if wanted:
                self._queue.hold(sequence, wanted[-1][0] + 1)
            self._events.fetch(sequence.key, source.donor, wanted)

    def fetched(
        self, key: Key, indices: Sequence[int], layers: Sequence[np.ndarray], generations: Sequence[int]
    ) -> None:
        """Verified blocks arrived from a donor."""
        self._fetches.arrive(key, indices, layers, generations)

    def fetch_ended(self, key: Key, answer: TokenChunk, lost: Sequence[int]) -> None:
        """All that the donor has arrived; `lost` is computed here."""
        self._fetches.end(key, answer, lost)

    def fetch_failed(self, key: Key) -> None:
        """No more comes: the rest is computed here. Unknown keys are fine."""
        self._fetches.abandon(key)
        if key in self._tasks:
            self._queue.resume(self._tasks[key].sequence)

    def grant(self, key: Key, blocks: Sequence[int]) -> None:
        """A ticket arrived: these block indices, ascending, are wanted. Unknown keys are fine.

        Blocks beyond the prompt's end are passed over: decode's blocks may be larger than ours.
        """
        task = self._tasks.get(key)
        if task is not None and task.wanted is None:
            total = len(task.sequence.request.token_ids)
            task.wanted = [block for block in blocks if block * self._replica.memory.page_size < total]

    def cancel(self, key: Key) -> None:
        """Free everything the sequence holds. Unknown keys are fine."""
        task = self._tasks.pop(key, None)
        if task is None:
            return
        self._fetches.abandon(key)
        task.sequence.finished = True
        self._queue.remove(task.sequence)
        self._replica.memory.release(task.sequence)

    def tick(self) -> bool:
        """One round: write what was fetched, dispatch a chunk, gather blocks, read the step before, hand over."""
        self._write_fetched()
        dispatched = self._dispatch()
        self._gather_wanted()
        while len(self._inflight) > (1 if dispatched else 0):
            self._read(*self._inflight.popleft())
        released = self._hand_over(wait=not dispatched)
        return dispatched or released

    def _write_fetched(self) -> None:
        for key in self._fetches.write():
            self._queue.resume(self._tasks[key].sequence)
        for key in self._fetches.late():
            self._events.fetch_abandoned(key)
            self.fetch_failed(key)

    def _dispatch(self) -> bool:
        chunks = self._queue.next_chunks(*self._replica.prefill_budget)
        if not chunks:
            return False
        for chunk in chunks:
            if chunk.start == chunk.sequence.num_cached:
                self._replica.stats.admitted(chunk.sequence)
                self._replica.prepare_slot(chunk.sequence)
        step, rows = self._replica.dispatch_prefill(chunks)
        step.start_copy()
        self._meter.prefill(chunks)
        for chunk in chunks:
            self._replica.memory.store(chunk.sequence, chunk.sequence.num_dispatched)
        self._inflight.append((step, rows, chunks))
        return True

    def _read(self, step: PendingStep, rows: list[int], chunks: list[Chunk]) -> None:
        if not any(chunk.is_last for chunk in chunks):
            self._meter.not_read()
            return
        tokens = step.tokens()
        self._meter.read()
        for row, chunk in zip(rows, chunks, strict=True):
            sequence = chunk.sequence
            if not chunk.is_last or sequence.finished:
                continue
            if tokens[row] < 0:
                self._discard(sequence)
                continue
            num_top = sequence.request.sampling.logprobs
            logprobs = step.logprobs(row, num_top) if num_top is not None else None
            task = self._tasks[sequence.key]
            self._replica.stats.prefilled(sequence)
            task.first_token = sequence.accept(tokens[row], self._eos, logprobs, cached_tokens=sequence.num_cached)
            self._events.tokens(task.first_token)

    def _discard(self, sequence: Seq) -> None:
        """Its logits are not finite: nothing of what it computed may be served, here or from the prefix cache."""
        shard = sequence.shard
        self.cancel(sequence.key)
        self._replica.memory.distrust(shard)
        self._events.failed(sequence.key, NotFinite(f"the logits of token {len(sequence.token_ids)} are not finite"))

    def _gather_wanted(self) -> None:
        """Queue the gathers right behind the step that filled the pages, before a later step."""
        for task in self._tasks.values():
            if not task.wanted or not self._events.writable:
                continue
            ready, pages = self._ready(task, task.wanted)
            if ready:
                export = Export(*task.sequence.key, tuple(ready))
                task.gathers.append((ready, self._replica.engine.gather(pages, export)))
                left = set(task.wanted).difference(ready)
                task.wanted = [i for i in task.wanted if i in left]

    def _ready(self, task: _Task, wanted: list[int]) -> tuple[list[int], list[int]]:
        """Those of the blocks that are here, or will be once what was dispatched so far has run; and their pages."""
        sequence, page_size = task.sequence, self._replica.memory.page_size
        fetch = self._fetches.get(sequence.key)
        if fetch is not None:
            ready, pages = [i for i in wanted if fetch.holds(i)], fetch.sequence.pages
        else:
            total, done = len(sequence.request.token_ids), sequence.num_dispatched
            ready, pages = [i for i in wanted if min((i + 1) * page_size, total) <= done], sequence.pages
        return ready, [pages[i] for i in ready]

    def _hand_over(self, *, wait: bool) -> bool:
        """Give gathered blocks to the sender; whether a sequence ended and its pages are free."""
        released = False
        for key, task in list(self._tasks.items()):
            while task.gathers and (wait or task.gathers[0][1].is_ready()):
                indices, pages = task.gathers.popleft()
                self._events.blocks(key, indices, pages.wait())
            if task.first_token is not None and task.wanted == [] and not task.gathers:
                del self._tasks[key]
                self._replica.memory.release(task.sequence)
                self._events.finished(key, task.first_token)
                released = True
        return released
