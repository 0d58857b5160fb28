"""What each pair of workers would cost a request, in seconds; the terms are those of `decision.Terms`.

A pair's cost is what its two workers cost each alone, plus the hand-over between them. Small fleets are weighed pair by
pair, large ones as a matrix; the formula is the same code.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine_core.types import Request
from router.candidate import Candidate
from router.cost_model import TransferModel
from router.decision import Option, Terms
from router.sessions import Pair
from router.standing import Standing, Standings, larger, smaller

Floats = npt.NDArray[np.float64]

NUM_RANKED = 4  # the best pair and some runners-up, for people
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
    itl: float = 1.0
    crowding: float = 1.0
    followers: float = 1.0
    affinity_s: float = 0.005
    local_prefill_tokens: int = -1
    overcommit: float = 0.25
    max_backlog_s: float = 2.0


class Reader(NamedTuple):
    """A worker that could read the prompt: tokens it holds and would compute, and what that costs, in seconds.

    Of many workers at once, `worker` is a list and all else `[n] f64` arrays; so in `Writer`.
    """

    worker: Any
    held: Any
    missing: Any
    chunks: Any
    queue_s: Any
    prefill_s: Any
    crowding_s: Any
    followers_s: Any
    affinity_s: Any
    total_s: Any


class Writer(NamedTuple):
    """A worker that could generate the answer.

    Attributes:
        local: the same worker, reading the prompt itself.
        num_bytes: of KV that it lacks.
        stall_s: what reading locally adds to the steps of the sequences that decode there now.
    """

    worker: Any
    local: Reader
    num_bytes: Any
    itl_s: Any
    stall_s: Any
    affinity_s: Any
    total_s: Any


class Choice(NamedTuple):
    """A pair; `reader` is None where the decode worker reads the prompt itself."""

    key: tuple[float, int]
    reader: Reader | None
    writer: Writer


class PairCosts:
    """Of one request, at one moment.

    Args:
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
        left = request.sampling.max_tokens - (self._num_tokens - request.num_prompt_tokens)
        self._output_tokens = min(left, output_tokens)
        self._now = now
        self._followers = 0.0

    def rank(
        self, sources: Sequence[Candidate], targets: Sequence[Candidate], standings: Standings
    ) -> tuple[list[Choice], int]:
        """The cheapest pairs, best first, and how many were weighed. Of equals, the one that waited longest.

        Args:
            sources, targets: prefill and decode workers that may be used; at least one target.
            standings: used where there are many.
        """
        if len(sources) * len(targets) <= SMALL:
            busy = [worker.standing().busy(self._now) for worker in sources or targets]
            self._followers = self._config.followers * _num_followers(sum(busy) / len(busy))
            readers = [self._reader_of(source, 0) for source in sources]
            writers = [self._writer_of(target) for target in targets]
            choices = [choice for reader in readers for writer in writers if (choice := self._pair(reader, writer))]
            choices += [self._local(writer) for writer in writers if not choices or self._may_read(writer)]
            num_weighed = len(choices)
        else:
            choices, num_weighed = self._best_of_many(sources, targets, standings.of([*sources, *targets]))
        return sorted(choices, key=_order)[:NUM_RANKED], num_weighed

    def option(self, choice: Choice) -> Option:
        """For people."""
        config, (_, reader, writer) = self._config, choice
        reading = reader or writer.local
        transfer_s = 0.0 if reader is None else config.transfer * self._transfer_s(reader, writer)
        terms = Terms(
            queue_s=reading.queue_s,
            prefill_s=reading.prefill_s,
            transfer_s=transfer_s,
            itl_s=writer.itl_s + (writer.stall_s if reader is None else 0.0),
            crowding_s=reading.crowding_s,
            followers_s=reading.followers_s,
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

    def _reader_of(self, worker: Candidate, role: int) -> Reader:
        affinity_s = self._affinity_s if self._last is not None and self._last[role] == worker.key else 0.0
        return self._reader(worker, worker.standing(), self._held.get(worker.key, 0), affinity_s)

    def _writer_of(self, worker: Candidate) -> Writer:
        return self._writer(worker.standing(), self._reader_of(worker, 1))

    @property
    def _affinity_s(self) -> float:
        """Each of the session's last two workers is worth half of it."""
        return -self._config.affinity_s / 2

    # one worker or many

    def _reader(self, worker: Any, standing: Standing, held: Any, affinity_s: Any) -> Reader:
        config, now, num_tokens, page_size = self._config, self._now, self._num_tokens, standing.page_size
        held = smaller(held, (num_tokens - 1) // page_size * page_size)  # the last token is computed, for its logits
        missing = num_tokens - held
        queue_s = config.queue * standing.queue_s(now)
        prefill_s = config.prefill * standing.prefill_s(missing, held)
        crowding_s = config.crowding * standing.expected_wait_s(now)
        followers_s = self._followers * prefill_s
        total_s = queue_s + prefill_s + crowding_s + followers_s + affinity_s
        chunks = standing.num_steps(missing)
        terms = queue_s, prefill_s, crowding_s, followers_s, affinity_s
        return Reader(worker, held, missing, chunks, *terms, total_s)

    def _writer(self, standing: Standing, local: Reader) -> Writer:
        """The sequence's own steps get longer by its neighbours, theirs by it."""
        config, num_tokens, page_size, rows = self._config, self._num_tokens, standing.page_size, standing.rows
        row_s = standing.decode_row_s + standing.decode_token_s * num_tokens
        alone_s = standing.decode_step_s + row_s
        crowd = larger(rows, standing.arrivals_per_s(self._now) * self._output_tokens * alone_s)  # Little's law
        slower_s = standing.decode_row_s * crowd + standing.decode_token_s * standing.kv_tokens
        itl_s = config.itl * self._output_tokens * (slower_s + crowd * row_s)
        num_pages = -(-num_tokens // page_size)
        stall_s = config.itl * rows * local.prefill_s
        num_bytes = (num_pages - local.held // page_size) * standing.block_bytes
        total_s = itl_s + local.affinity_s
        return Writer(local.worker, local, num_bytes, itl_s, stall_s, local.affinity_s, total_s)

    def _may_read(self, writer: Writer) -> Any:
        limit = self._config.local_prefill_tokens
        return writer.local.missing <= (limit if limit >= 0 else math.inf)

    # pairs

    def _pair(self, reader: Reader, writer: Writer) -> Choice | None:
        """None where the two must not exchange KV."""
        if reader.worker.info.fingerprint != writer.worker.info.fingerprint:
            return None
        total_s = reader.total_s + writer.total_s + self._config.transfer * self._transfer_s(reader, writer)
        return Choice((total_s, reader.worker.turn + writer.worker.turn), reader, writer)

    def _local(self, writer: Writer) -> Choice:
        return Choice((_local_s(writer), 2 * writer.worker.turn), None, writer)

    def _transfer_s(self, reader: Reader, writer: Writer) -> float:
        fixed_s, byte_s = self._transfers.link(reader.worker.key, writer.worker.key)
        return fixed_s + float(_left_s(byte_s * writer.num_bytes, reader.chunks, reader.prefill_s))

    def _best_of_many(
        self, sources: Sequence[Candidate], targets: Sequence[Candidate], standing: Standing
    ) -> tuple[list[Choice], int]:
        """The best choices, and how many there are. `standing` is of sources, then targets."""
        count, width, workers = len(sources), len(targets), [*sources, *targets]
        of_sources: Standing = _sliced(standing, 0, count)
        of_targets: Standing = _sliced(standing, count, len(workers))
        busy = (of_sources if count else of_targets).busy(self._now)
        self._followers = self._config.followers * _num_followers(float(busy.mean()))
        held = np.array([self._held.get(worker.key, 0) for worker in workers], np.float64)
        reading = self._reader(workers, standing, held, self._affinities(workers, count))
        reader: Reader = _sliced(reading, 0, count)
        writer = self._writer(of_targets, _sliced(reading, count, len(workers)))
        fixed_s, byte_s = self._transfers.links([one.key for one in sources], [one.key for one in targets])
        left_s = _left_s(byte_s * writer.num_bytes, reader.chunks[:, None], reader.prefill_s[:, None])
        costs_s = np.empty((count + 1, width))  # of pairs, and in the last row of targets that read the prompt, too
        costs_s[:count] = self._config.transfer * (fixed_s + left_s) + reader.total_s[:, None] + writer.total_s
        _forbid_strangers(costs_s[:count], sources, targets)
        costs_s[count] = _local_s(writer)
        if np.isfinite(costs_s[:count]).any():
            costs_s[count][~self._may_read(writer)] = np.inf
        turns = np.array([worker.turn for worker in workers])
        both = np.concatenate((turns[:count, None] + turns[count:], 2 * turns[None, count:]))
        best = [divmod(at, width) for at in _least(costs_s.reshape(-1), both.reshape(-1))]
        writers = {column: _writer_at(writer, column) for _, column in best}
        choices = [
            self._local(writers[column]) if row == count else self._pair(_reader_at(reader, row), writers[column])
            for row, column in best
        ]
        return [choice for choice in choices if choice], int(np.isfinite(costs_s).sum())

    def _affinities(self, workers: Sequence[Candidate], num_sources: int) -> Floats:
        """Per worker, what affinity is worth."""
        affinity_s = np.zeros(len(workers))
        if self._last is not None:
            for at, worker in enumerate(workers):
                if worker.key == self._last[at >= num_sources]:
                    affinity_s[at] = self._affinity_s
        return affinity_s


def _sliced(fields: Any, start: int, end: int) -> Any:
    """Some of many workers."""
    return type(fields)(*[field[start:end] for field in fields])


def _reader_at(reader: Reader, at: int) -> Reader:
    """One of many, in numbers."""
    worker, held, missing, *rest = [field[at] for field in reader]
    return Reader(worker, int(held), int(missing), *map(float, rest))


def _writer_at(writer: Writer, at: int) -> Writer:
    """One of many, in numbers."""
    workers, local, *rest = writer
    num_bytes, *seconds = [field[at] for field in rest]
    return Writer(workers[at], _reader_at(local, at), int(num_bytes), *map(float, seconds))


def _left_s(moving_s: Any, chunks: Any, prefill_s: Any) -> Any:
    """What of a hand-over is left when prefill ends: its last chunk, or all that prefill was too short to hide.

    Takes numbers or arrays alike; `(a + b + |a - b|) / 2` is the larger of two.
    """
    last_s = moving_s / chunks
    late_s = moving_s - prefill_s * (1 - 1 / chunks)
    return (last_s + late_s + abs(last_s - late_s)) / 2


def _num_followers(busy: float) -> float:
    """Seconds that others wait for each second of prefill that is added to a worker with so much of it.

    Where arrivals wait for `busy / (1 - busy) / 2` mean prompts, as in `Standing.expected_wait_s`, all of them together
    wait `busy ** 2 / (1 - busy) / 2` seconds per second; this is its derivative.
    """
    return 0.5 * busy * (2 - busy) / (1 - busy) ** 2


def _local_s(writer: Writer) -> Any:
    """Of a worker that does both."""
    return writer.local.total_s + writer.total_s + writer.stall_s


def _least(costs_s: Floats, turns: npt.NDArray[np.int64]) -> list[int]:
    """Where the `NUM_RANKED` least costs are, of equals those with the earliest turns; infinite ones left out."""
    count = min(NUM_RANKED, len(costs_s))
    limit_s = np.partition(costs_s, count - 1)[count - 1] + SAME_S
    close = np.flatnonzero(costs_s <= min(limit_s, sys.float_info.max))
    order = np.lexsort((turns[close], np.rint(costs_s[close] / SAME_S)))
    found: list[int] = close[order[:count]].tolist()
    return found


def _forbid_strangers(total_s: Floats, sources: Sequence[Candidate], targets: Sequence[Candidate]) -> None:
    """Workers of unequal fingerprints never exchange KV."""
    of_sources = [worker.info.fingerprint for worker in sources]
    of_targets = [worker.info.fingerprint for worker in targets]
    if len({*of_sources, *of_targets}) > 1:
        total_s[np.array(of_sources)[:, None] != np.array(of_targets)] = np.inf


def _order(choice: Choice) -> tuple[int, int]:
    total_s, turn = choice.key
    return round(total_s / SAME_S), turn
