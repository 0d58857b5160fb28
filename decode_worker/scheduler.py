"""The decode role's overlap scheduler: step i+1 is dispatched before step i's tokens are read. On the engine thread.

Life of a sequence here:
    remote: add -> waits for pages -> ticket -> blocks land, are scattered between steps -> landed with its first token
            -> ready -> takes a slot -> running
            with blocks lost: pages released but for the leading ones in the prefix cache -> head of the chunk queue
    local:  add -> (chunk queue) pages and slot -> chunks dispatched -> running as soon as its last chunk is dispatched
    scored: local, in steps of their own that give log probabilities of the prompt, told with the first token
    running -> one row of each decode step -> stop token, limit or cancel: pages released, at most one wasted row
    preempted (no page for the next token, youngest first): in-flight steps are read, pages released, back to the head
            of the chunk queue with all tokens it has, to be recomputed locally

Sampled tokens stay on the device as the next step's input. A page released here may be written once more by a step in
flight; that write is dispatched before any by the page's next owner, so device order keeps them apart.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engine_core.batch import Chunk
from engine_core.chunking import ChunkQueue
from engine_core.engine import PendingStep
from engine_core.errors import BatonError, NoFreePages, NotFinite
from engine_core.landings import Landed, Landing, Landings
from engine_core.messages import PeerAddress, StepSums, TokenChunk
from engine_core.replica import Replica
from engine_core.sequence import Sequence as Seq
from engine_core.step_meter import StepMeter
from engine_core.types import Request

Key = tuple[str, int]

PATIENCE_S = 10.0  # of landings that others overtake; far below the lease of what is to land


class DecodeEvents(Protocol):
    """What the scheduler tells its worker; called on the engine thread."""

    def reserved(self, key: Key, prefill: PeerAddress, wanted: list[tuple[int, int]]) -> None:
        """Pages are reserved: ask `prefill` for these (block index, page generation)."""

    def tokens(self, chunks: list[TokenChunk]) -> None:
        """What one step produced."""

    def failed(self, key: Key, error: BatonError) -> None:
        """The sequence is gone."""


@dataclass(slots=True)
class _Flight:
    """A dispatched step and whose rows it holds: (sequence, row); of `scores`, a row for each token."""

    step: PendingStep
    rows: list[tuple[Seq, int]] = field(default_factory=list)
    scores: list[tuple[Seq, range]] = field(default_factory=list)


class DecodeScheduler:
    """Continuous batching over one replica.

    Args:
        replica: engine and host state.
        events: where results go.
        overlap: dispatch a step before reading the one before it. Off only in benchmarks.
    """

    def __init__(self, replica: Replica, events: DecodeEvents, *, overlap: bool = True) -> None:
        self._replica = replica
        self._events = events
        self._depth = 1 if overlap else 0
        self._queue = ChunkQueue(replica.memory)
        self._scoring = ChunkQueue(replica.memory)
        self._sequences: dict[Key, Seq] = {}
        self._waiting: deque[tuple[Seq, PeerAddress]] = deque()
        self._landings = Landings(replica.memory, replica.engine)
        self._ready: deque[Seq] = deque()
        self._running: list[Seq] = []
        self._inflight: deque[_Flight] = deque()
        self._eos = frozenset(replica.resolved.spec.eos_token_ids)
        self._meter = StepMeter(time.monotonic, lambda: replica.compiles_after_warmup)
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        """Rows of the decode batch in use."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not decode yet."""
        return len(self._sequences) - len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Tokens of local prefill still to be computed."""
        return self._queue.queued_tokens + self._scoring.queued_tokens

    def drain_samples(self) -> list[StepSums]:
        """How long steps took since the last call."""
        return self._meter.drain()

    def add(self, request: Request, prefill: PeerAddress | None) -> None:
        """Take a request; `prefill` is who computes its prompt, None for this worker. Duplicates are ignored."""
        sequence = Seq.of(request)
        if sequence.key in self._sequences:
            return
        self._sequences[sequence.key] = sequence
        if prefill is None:
            (self._scoring if sequence.scores_prompt else self._queue).add(sequence)
        else:
            self._waiting.append((sequence, prefill))

    def land(self, key: Key, indices: Sequence[int], layers: Sequence[np.ndarray], generations: Sequence[int]) -> None:
        """Verified blocks arrived: they are written between the next steps, a few at a time."""
        self._landings.arrive(key, indices, layers, generations)

    def landed(self, key: Key, first_token: TokenChunk, lost: Sequence[int] = ()) -> None:
        """All wanted blocks but those of `lost` have arrived; the prefill worker has told the gateway the first token.

        The prompt is computed here from the first lost block on.
        """
        self._landings.end(key, first_token, lost)

    def _write_arrived(self) -> None:
        """Write what has landed: everything, or one portion per step while sequences are running."""
        for landing, landed in self._landings.write(everything=not self._running):
            self._finish_landing(landing, landed)

    def _finish_landing(self, landing: Landing, landed: Landed) -> None:
        sequence, first_token, memory = landing.sequence, landed.first_token, self._replica.memory
        if landed.lost:
            self._landings.keep(landing)
        else:
            sequence.num_dispatched = len(sequence.token_ids)
            memory.store(sequence, sequence.num_dispatched)
        if first_token.finish_reason is not None:
            self._drop(sequence)
            return
        sequence.token_ids += first_token.token_ids
        sequence.num_sampled += len(first_token.token_ids)
        if landed.lost:
            memory.release(sequence)
            self._queue.add(sequence, first=True)
            return
        sequence.token_on_host = True
        self._ready.append(sequence)

    def fail(self, key: Key, error: BatonError) -> None:
        """The hand-over failed: free the sequence and say so; the gateway places it again."""
        if key in self._sequences:
            self.cancel(key)
            self._events.failed(key, error)

    def cancel(self, key: Key) -> None:
        """Free everything the sequence holds. Unknown keys are fine."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return
        self._landings.abandon(key)
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not sequence)
        if sequence in self._ready:
            self._ready.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        self._queue.remove(sequence)
        self._scoring.remove(sequence)
        self._drop(sequence)

    def tick(self) -> bool:
        """One round: reserve landings, admit, dispatch a prefill chunk and a decode step, read the steps before."""
        self._reserve_landings()
        self._write_arrived()
        self._admit_ready()
        before = len(self._inflight)
        self._dispatch_prefill()
        self._dispatch_scoring()
        self._dispatch_decode()
        dispatched = len(self._inflight) > before
        chunks: list[TokenChunk] = []
        while len(self._inflight) > (self._depth if dispatched else 0):
            self._read(self._inflight.popleft(), chunks)
        if chunks:
            self._events.tokens(chunks)
        return dispatched or bool(chunks) or self._landings.is_behind

    def _reserve_landings(self) -> None:
        memory = self._replica.memory
        while self._waiting:
            sequence, prefill = self._waiting[0]
            if self._is_early(sequence) or not memory.place(sequence, computes=False):
                break
            self._waiting.popleft()
            self._replica.stats.admitted(sequence)
            self._events.reserved(sequence.key, prefill, self._landings.begin(sequence))
        self._queue.before = self._scoring.before = self._last_turn()

    def _is_early(self, sequence: Seq) -> bool:
        """Whether one that is computed here, most often preempted, came before it and waits for pages.

        Behind all those that need fewer it would wait long, while they evict what is cached of it. Where nothing is
        running that will leave pages, it may itself wait for the landing.
        """
        starved = self._queue.starved
        return starved is not None and bool(self._running) and starved.created_at < sequence.created_at

    def _last_turn(self) -> float:
        """Until when prompts must have come to be given pages here.

        While the first landing waits, short prompts that came later and need fewer pages than it are read: more clients
        get their answers in time. But not for ever: where they keep coming, they would take each page that is freed.
        """
        if self._waiting and self._running:
            came_at = self._waiting[0][0].created_at
            if time.monotonic() - came_at > PATIENCE_S:
                return came_at
        return math.inf

    def _admit_ready(self) -> None:
        memory = self._replica.memory
        for sequence in list(self._ready):
            if not memory.has_slot(sequence):  # another row shard may have one
                continue
            self._ready.remove(sequence)
            memory.take_slot(sequence)
            self._replica.prepare_slot(sequence)
            self._replica.stats.decoding(sequence)
            self._running.append(sequence)

    def _dispatch_prefill(self) -> None:
        chunks = self._queue.next_chunks(*self._replica.prefill_budget)
        if chunks:
            self._begin(chunks)
            self._fly(*self._replica.dispatch_prefill(chunks), chunks)

    def _dispatch_scoring(self) -> None:
        chunks = self._scoring.next_chunks(*self._replica.scoring_budget)
        if not chunks:
            return
        self._begin(chunks)
        step, rows = self._replica.dispatch_scoring(chunks)
        flight = self._fly(step, rows, chunks)
        for last, chunk in zip(rows, chunks, strict=True):
            scored = range(last + 1 - chunk.count, last if chunk.is_last else last + 1)
            flight.scores.append((chunk.sequence, scored))

    def _begin(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            if chunk.start == chunk.sequence.num_cached:
                self._replica.stats.admitted(chunk.sequence)
                self._replica.prepare_slot(chunk.sequence)

    def _fly(self, step: PendingStep, rows: list[int], chunks: list[Chunk]) -> _Flight:
        """A step over chunks was dispatched; `rows` of its output hold their sampled tokens."""
        step.start_copy()
        self._meter.prefill(chunks)
        flight = _Flight(step)
        for row, chunk in zip(rows, chunks, strict=True):
            self._replica.memory.store(chunk.sequence, chunk.sequence.num_dispatched)
            if chunk.is_last:
                chunk.sequence.token_on_host = False
                self._running.append(chunk.sequence)
                flight.rows.append((chunk.sequence, row))
        self._inflight.append(flight)
        return flight

    def _dispatch_decode(self) -> None:
        batch = self._with_pages([s for s in self._running if s.wants_more])
        if not batch:
            return
        step, rows = self._replica.dispatch_decode(batch)
        step.start_copy()
        for sequence in batch:
            sequence.num_dispatched += 1
            sequence.num_sampled += 1
            sequence.token_on_host = False
        self._meter.decode(batch)
        self._inflight.append(_Flight(step, list(zip(batch, rows, strict=True))))

    def _with_pages(self, batch: list[Seq]) -> list[Seq]:
        """Those of `batch` that have a page for their next token, once the youngest have made room."""
        for sequence in list(batch):
            while sequence in batch:
                try:
                    self._replica.memory.grow(sequence, sequence.num_dispatched + 1)
                    break
                except NoFreePages:
                    self._make_room(sequence.shard)
                    batch = [s for s in batch if s in self._running and s.wants_more]
        return batch

    def _make_room(self, shard: int) -> None:
        """Read what is in flight: a sequence may end, and the host then knows all tokens. Else preempt the youngest.

        Of a row shard, on which there is one: that which asks.
        """
        if self._inflight:
            chunks: list[TokenChunk] = []
            while self._inflight:
                self._read(self._inflight.popleft(), chunks)
            self._events.tokens(chunks)
            return
        victim = next(s for s in reversed(self._running) if s.shard == shard)
        self._running.remove(victim)
        self._replica.memory.store(victim, victim.num_valid)
        self._replica.memory.release(victim)
        self._replica.stats.preempted(victim)
        self._queue.add(victim, first=True)
        self.num_preemptions += 1

    def _read(self, flight: _Flight, chunks: list[TokenChunk]) -> None:
        for sequence, scored in flight.scores:
            if sequence.finished:
                continue
            if any(flight.step.tokens()[row] < 0 for row in scored):
                self._discard(sequence)
                continue
            num_alternatives = sequence.request.sampling.logprobs or 0
            sequence.prompt_logprobs += [flight.step.logprobs(row, num_alternatives) for row in scored]
        if not flight.rows:
            self._meter.not_read()
            return
        tokens = flight.step.tokens()
        self._meter.read()
        for sequence, row in flight.rows:
            if sequence.finished:
                continue
            if tokens[row] < 0:
                self._discard(sequence)
                continue
            num_top = sequence.request.sampling.logprobs
            logprobs = flight.step.logprobs(row, num_top) if num_top is not None else None
            if not sequence.decoding_at:
                self._replica.stats.prefilled(sequence)
            cached = 0 if sequence.cached_told else sequence.num_cached
            sequence.cached_told = True
            chunks.append(sequence.accept(tokens[row], self._eos, logprobs, cached))
            if sequence.finished:
                self._replica.stats.finished(sequence)
                self._running.remove(sequence)
                self._drop(sequence)

    def _discard(self, sequence: Seq) -> None:
        """Its logits are not finite: nothing of what it computed may be served, here or from the prefix cache."""
        shard = sequence.shard
        self.fail(sequence.key, NotFinite(f"the logits of token {len(sequence.token_ids)} are not finite"))
        self._replica.memory.distrust(shard)

    def _drop(self, sequence: Seq) -> None:
        """Return what a finished or cancelled sequence holds; what it computed stays in the prefix cache."""
        sequence.finished = True
        if sequence.slot >= 0:
            self._replica.memory.store(sequence, sequence.num_valid)
        self._replica.memory.release(sequence)
        del self._sequences[sequence.key]
