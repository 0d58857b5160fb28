"""What each pair of workers would cost a request, in seconds; the terms are those of `decision.Terms`.

A pair's cost is what its two workers cost each alone, plus the hand-over between them. Small fleets are weighed pair by
pair, large ones as a matrix; the formula is the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from engine_core.types import Request
from router.candidate import Candidate
from router.cost_model import TransferModel
from router.decision import Option, Terms
from router.sessions import Pair

NUM_RANKED = 4  # the best pair and some runners-up, for people
MAX_UTILIZATION = 0.95
SAME_S = 1e-6  # costs that differ by less are equal
SMALL = 64  # pairs that are weighed one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    """How much each term counts; 0 switches it off, as the ablations do.

    Attributes:
        affinity_s: what it is worth to send a session where it was before.
        local_prefill_tokens: a decode worker may read a prompt itself where at most so many tokens are to be computed;
            -1: any number.
        overcommit: a decode worker has room for so many more sequences than it has slots, as a share: they hand over.
        max_backlog_s: of prompts at a prefill worker, beyond which it has no room.
    """

    queue: float = 1.0
    prefill: float = 1.0
    transfer: float = 1.0
    slot_wait: float = 1.0
    itl: float = 1.0
    crowding: float = 1.0
    affinity_s: float = 0.005
    local_prefill_tokens: int = -1
    overcommit: float = 0.25
    max_backlog_s: float = 2.0


class Reader(NamedTuple):
    """A worker that could read the prompt: tokens it holds and would compute, and what that costs, in seconds."""

    worker: Candidate
    held: int
    missing: int
    chunks: int
    queue_s: float
    prefill_s: float
    crowding_s: float
    affinity_s: float
    total_s: float


class Writer(NamedTuple):
    """A worker that could generate the answer.

    Attributes:
        local: the same worker, reading the prompt itself.
        num_bytes: of KV that it lacks.
        stall_s: what reading locally adds to the steps of the sequences that decode there now.
    """

    worker: Candidate
    local: Reader
    num_bytes: int
    slot_wait_s: float
    itl_s: float
    stall_s: float
    affinity_s: float
    total_s: float


class Choice(NamedTuple):
    """A pair; `reader` is None where the decode worker reads the prompt itself."""

    key: tuple[float, int]
    reader: Reader | None
    writer: Writer


class PairCosts:
    """Of one request, at one moment.

    Args:
        sources, targets: prefill and decode workers that may be used; at least one target.
        held: worker -> leading tokens of the prompt that it holds; a worker that is not in it holds none.
        last: where the session's last request went.
        output_tokens: of an answer, on average.
    """

    def __init__(
        self,
        config: PlacementConfig,
        transfers: TransferModel,
        request: Request,
        held: dict[object, int],
        last: Pair | None,
        output_tokens: float,
        now: float,
    ) -> None:
        self._config = config
        self._transfers = transfers
        self._num_tokens = len(request.token_ids)
        self._held = held
        self._last = last
        self._mean_output_tokens = output_tokens
        left = request.sampling.max_tokens - (self._num_tokens - request.num_prompt_tokens)
        self._output_tokens = min(left, output_tokens)
        self._now = now

    def rank(self, sources: Sequence[Candidate], targets: Sequence[Candidate]) -> tuple[list[Choice], int]:
        """The cheapest pairs, best first, and how many were weighed. Of equals, the one that waited longest."""
        readers = [self._reader(source, 0) for source in sources]
        writers = [self._writer(target) for target in targets]
        if len(readers) * len(writers) <= SMALL:
            choices = [choice for reader in readers for writer in writers if (choice := self._pair(reader, writer))]
            num_weighed = len(choices)
        else:
            choices, num_weighed = self._best_of_many(readers, writers)
        limit = self._config.local_prefill_tokens
        for writer in writers:
            if limit < 0 or writer.local.missing <= limit or not num_weighed:
                choices.append(self._local(writer))
        num_weighed += len([choice for choice in choices if choice.reader is None])
        choices.sort(key=_order)
        return choices[:NUM_RANKED], num_weighed

    def option(self, choice: Choice) -> Option:
        """For people."""
        config, (_, reader, writer) = self._config, choice
        reading = reader or writer.local
        transfer_s = 0.0 if reader is None else config.transfer * self._transfer_s(reader, writer)
        terms = Terms(
            queue_s=reading.queue_s,
            prefill_s=reading.prefill_s,
            transfer_s=transfer_s,
            slot_wait_s=writer.slot_wait_s,
            itl_s=writer.itl_s + (writer.stall_s if reader is None else 0.0),
            crowding_s=reading.crowding_s,
            affinity_s=reading.affinity_s + writer.affinity_s,
        )
        return Option(
            prefill=reader.worker.name if reader else None,
            decode=writer.worker.name,
            held_prefill_tokens=reading.held,
            held_decode_tokens=writer.local.held,
            terms=terms,
        )

    # one worker

    def _reader(self, worker: Candidate, last_index: int) -> Reader:
        config, info, num_tokens = self._config, worker.info, self._num_tokens
        held = self._held.get(worker.key, 0)
        if held >= num_tokens:  # the last block at the least is computed, for its logits
            held = (num_tokens - 1) // info.page_size * info.page_size
        missing = num_tokens - held
        queue_s = config.queue * worker.queue_s(self._now)
        prefill_s = config.prefill * worker.steps.prefill_s(missing, held, info.chunk_tokens)
        crowding_s = config.crowding * _expected_wait(worker, self._now)
        affinity_s = self._affinity_s(worker, last_index)
        chunks = num_chunks(worker, missing)
        total_s = queue_s + prefill_s + crowding_s + affinity_s
        return Reader(worker, held, missing, chunks, queue_s, prefill_s, crowding_s, affinity_s, total_s)

    def _writer(self, worker: Candidate) -> Writer:
        """The sequence's own steps get longer by its neighbours, theirs by it; a full worker makes it wait."""
        config, info, num_tokens = self._config, worker.info, self._num_tokens
        local = self._reader(worker, 1)
        per_step, per_row, per_token = worker.steps.coefficients[3:]
        rows = worker.num_rows()
        alone_s = per_step + per_row + per_token * num_tokens
        crowd = max(rows, worker.arrivals(self._now) * self._output_tokens * alone_s)  # Little's law
        slower_s = per_row * crowd + per_token * worker.kv_tokens(rows)
        itl_s = config.itl * self._output_tokens * (slower_s + crowd * (per_row + per_token * num_tokens))
        over = max(0, rows + 1 - info.num_slots) / max(info.num_slots, 1)
        over = max(over, worker.missing_pages(-(-num_tokens // info.page_size)) / max(info.num_pages, 1))
        wait_s = config.slot_wait * over * self._mean_output_tokens * (alone_s + slower_s)
        stall_s = config.itl * rows * local.prefill_s
        num_bytes = transfer_bytes(worker, local.held, num_tokens)
        total_s = wait_s + itl_s + local.affinity_s
        return Writer(worker, local, num_bytes, wait_s, itl_s, stall_s, local.affinity_s, total_s)

    def _affinity_s(self, worker: Candidate, index: int) -> float:
        """Each of the session's last two workers is worth half of it."""
        if self._last is None or self._last[index] != worker.key:
            return 0.0
        return -self._config.affinity_s / 2

    # pairs

    def _pair(self, reader: Reader, writer: Writer) -> Choice | None:
        """None where the two must not exchange KV."""
        if reader.worker.info.fingerprint != writer.worker.info.fingerprint:
            return None
        total_s = reader.total_s + writer.total_s + self._config.transfer * self._transfer_s(reader, writer)
        return Choice((total_s, reader.worker.turn + writer.worker.turn), reader, writer)

    def _local(self, writer: Writer) -> Choice:
        total_s = writer.local.total_s + writer.total_s + writer.stall_s
        return Choice((total_s, 2 * writer.worker.turn), None, writer)

    def _transfer_s(self, reader: Reader, writer: Writer) -> float:
        fixed_s, byte_s = self._transfers.link(reader.worker.key, writer.worker.key)
        return fixed_s + float(_left_s(byte_s * writer.num_bytes, reader.chunks, reader.prefill_s))

    def _best_of_many(self, readers: Sequence[Reader], writers: Sequence[Writer]) -> tuple[list[Choice], int]:
        """The best pairs, and those as good as the best; and how many may be paired."""
        fixed_s, byte_s = self._transfers.links(
            [reader.worker.key for reader in readers], [writer.worker.key for writer in writers]
        )
        chunks = np.array([reader.chunks for reader in readers])[:, None]
        prefill_s = np.array([reader.prefill_s for reader in readers])[:, None]
        moving_s = byte_s * np.array([float(writer.num_bytes) for writer in writers])
        total_s = fixed_s + _left_s(moving_s, chunks, prefill_s)
        total_s *= self._config.transfer
        total_s += np.array([reader.total_s for reader in readers])[:, None]
        total_s += np.array([writer.total_s for writer in writers])
        _forbid_strangers(total_s, readers, writers)
        flat_s = total_s.reshape(-1)
        best = np.argpartition(flat_s, min(NUM_RANKED, len(flat_s) - 1))[:NUM_RANKED]
        equal = np.flatnonzero(flat_s <= flat_s[best].min() + SAME_S)
        pairs = [divmod(at, len(writers)) for at in {*best.tolist(), *equal.tolist()}]
        choices = [self._pair(readers[row], writers[column]) for row, column in pairs]
        return [choice for choice in choices if choice], int(np.isfinite(flat_s).sum())


def num_chunks(worker: Candidate, num_tokens: int) -> int:
    """Steps in which a prefill worker computes so many tokens."""
    return max(1, -(-num_tokens // worker.info.chunk_tokens)) if worker.info.chunk_tokens else 1


def transfer_bytes(worker: Candidate, held_tokens: int, num_tokens: int) -> int:
    """KV bytes of a prompt that a decode worker lacks."""
    page_size = worker.info.page_size
    return (-(-num_tokens // page_size) - held_tokens // page_size) * worker.info.block_bytes


def _left_s(moving_s: Any, chunks: Any, prefill_s: Any) -> Any:
    """What of a hand-over is left when prefill ends: its last chunk, or all that prefill was too short to hide.

    Takes numbers or arrays alike; `(a + b + |a - b|) / 2` is the larger of two.
    """
    last_s = moving_s / chunks
    late_s = moving_s - prefill_s * (1 - 1 / chunks)
    return (last_s + late_s + abs(last_s - late_s)) / 2


def _forbid_strangers(total_s: Any, readers: Sequence[Reader], writers: Sequence[Writer]) -> None:
    """Workers of unequal fingerprints never exchange KV."""
    sources = [reader.worker.info.fingerprint for reader in readers]
    targets = [writer.worker.info.fingerprint for writer in writers]
    if len({*sources, *targets}) > 1:
        total_s[np.array(sources)[:, None] != np.array(targets)] = np.inf


def _order(choice: Choice) -> tuple[int, int]:
    total_s, turn = choice.key
    return round(total_s / SAME_S), turn


def _expected_wait(worker: Candidate, now: float) -> float:
    """Mean wait at this utilization, as in an M/M/1 queue with half its service time left on average.

    Requests that come one at a time find every queue empty; without this term the worker that holds the most popular
    prefix would get all of them until it is saturated.
    """
    mean_s = worker.mean_prefill_s.value
    if not mean_s:
        return 0.0
    busy = min(worker.utilization(now), MAX_UTILIZATION)
    return 0.5 * busy / (1 - busy) * mean_s
