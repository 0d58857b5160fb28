"""What each pair of workers would cost a request, in seconds; the terms are those of `decision.Terms`.

A pair's cost is what its two workers cost each alone, plus the hand-over between them. A prefill worker that could
fetch leading blocks from a donor is weighed twice: with it and without. This is the definition, of which
`compiled/ranking.cc` is a translation. Without a compiler small fleets are weighed by it pair by pair, and of large
ones the few that `pair_matrix` found to be best.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from router.candidate import Candidate
from router.cost_model import TransferModel, num_chunks
from router.decision import Option, Terms
from router.donors import Donor, find_donor, rank_donors
from router.sessions import Pair

SAME_S = 1e-6  # costs that differ by less are equal
NUM_RANKED = 3  # the best pair and two runners-up, for people


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    """How much each term counts; 0 switches it off, as the ablations do.

    Attributes:
        affinity_s: what it is worth to send a session where it was before.
        local_prefill_tokens: a decode worker may read a prompt itself where at most so many tokens are to be computed;
            -1: any number.
        overcommit: a decode worker has room for so many more sequences than it has slots, as a share: they hand over.
        max_backlog_s: of prompts at a prefill worker, beyond which it has no room.
        donors: whether prefill workers may fetch what others hold.
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
    donors: bool = True


class Reader(NamedTuple):
    """A worker that could read the prompt: tokens it holds and would compute, and what that costs, in seconds.

    Attributes:
        donor: who hands it `fetched` tokens more than it holds; None: nobody.
    """

    worker: Candidate
    held: int
    missing: int
    chunks: int
    queue_s: float
    prefill_s: float
    crowding_s: float
    followers_s: float
    affinity_s: float
    total_s: float
    fetch_s: float
    donor: Candidate | None
    fetched: int


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
    itl_s: float
    stall_s: float
    affinity_s: float
    total_s: float


class Choice(NamedTuple):
    """A pair; `reader` is None where the decode worker reads the prompt itself."""

    key: tuple[float, int]
    reader: Reader | None
    writer: Writer
    transfer_s: float


class Pairing(NamedTuple):
    """Who a choice is about.

    Attributes:
        source: None where the target reads the prompt.
        fetches: whether the source does, from its best donor.
    """

    source: Candidate | None
    target: Candidate
    fetches: bool


class Weighed(NamedTuple):
    """A choice, whoever computed its costs.

    Attributes:
        prefill: None where the decode worker reads the prompt itself.
        missing: tokens to be computed.
        reading_s: how long that takes.
        num_bytes: of KV that the decode worker lacks.
        donor: from whom the prefill worker fetches; None: from nobody.
        option: the terms.
    """

    prefill: Candidate | None
    decode: Candidate
    missing: int
    reading_s: float
    num_bytes: int
    donor: Candidate | None
    option: Option


class Ranking(NamedTuple):
    """The `NUM_RANKED` best choices, the best first, and of how many they are the best."""

    best: list[Weighed]
    num_weighed: int


class Asked(NamedTuple):
    """What of a request decides its costs.

    Attributes:
        num_tokens: of the prompt.
        output_tokens: still to come, on average.
        held: worker -> leading tokens of the prompt that it holds; a worker that is not in it holds none.
        last: where the session's last request went.
        told: as `held`, without predictions; of those that may donate.
        leaving: workers that may only donate.
    """

    num_tokens: int
    output_tokens: float
    held: Mapping[Hashable, int]
    last: Pair | None
    told: Mapping[Hashable, int]
    leaving: Sequence[Candidate]


class PairCosts:
    """Of one request, at one moment.

    Args:
        busy: mean utilization of the workers that read prompts, of late.
    """

    def __init__(
        self, config: PlacementConfig, transfers: TransferModel, asked: Asked, busy: float, now: float
    ) -> None:
        self._config = config
        self._transfers = transfers
        self._asked = asked
        self._now = now
        self._followers = config.followers * num_followers(busy)

    def all(self, sources: Sequence[Candidate], targets: Sequence[Candidate]) -> list[Choice]:
        """All pairs that may be chosen, the cheapest first. Of equals, the one that waited longest.

        Args:
            sources, targets: prefill and decode workers that may be used; at least one target.
        """
        readers = [self._reader(source, 0) for source in sources]
        writers = [self._writer(target) for target in targets]
        donors = self._donors(sources, targets)
        readers += [fetching for reader in readers if (fetching := self._fetching(reader, donors))]
        choices = [choice for reader in readers for writer in writers if (choice := self._pair(reader, writer))]
        choices += [self._local(writer) for writer in writers if not choices or self._may_read(writer)]
        return sorted(choices, key=_order)

    def some(
        self, found: Iterable[Pairing], sources: Sequence[Candidate], targets: Sequence[Candidate]
    ) -> list[Choice]:
        """The same of these pairs, which may be chosen."""
        readers: dict[tuple[Candidate, bool], Reader] = {}
        writers: dict[Candidate, Writer] = {}
        donors = self._donors(sources, targets)
        choices = []
        for source, target, fetches in found:
            writer = writers.get(target) or writers.setdefault(target, self._writer(target))
            choice: Choice | None
            if source is None:
                choice = self._local(writer)
            else:
                reader: Reader | None = readers.get((source, fetches))
                if reader is None:
                    reader = self._reader(source, 0)
                    reader = self._fetching(reader, donors) if fetches else reader
                    assert reader is not None, source
                    readers[source, fetches] = reader
                choice = self._pair(reader, writer)
                assert choice is not None, (source, target)
            choices.append(choice)
        return sorted(choices, key=_order)

    def ranking(self, choices: Sequence[Choice], num_weighed: int) -> Ranking:
        """The first of `choices`, which are in order."""
        return Ranking([self._weighed(choice) for choice in choices[:NUM_RANKED]], num_weighed)

    def _weighed(self, choice: Choice) -> Weighed:
        _, reader, writer, transfer_s = choice
        reading = reader or writer.local
        worker = reading.worker
        there = reading.held + reading.fetched
        reading_s = worker.steps.prefill_s(reading.missing, there, worker.info.chunk_tokens)
        terms = Terms(
            queue_s=reading.queue_s,
            prefill_s=reading.prefill_s,
            transfer_s=transfer_s,
            itl_s=writer.itl_s + (writer.stall_s if reader is None else 0.0),
            crowding_s=reading.crowding_s,
            followers_s=reading.followers_s,
            affinity_s=reading.affinity_s + writer.affinity_s,
            fetch_s=reading.fetch_s,
        )
        option = Option(
            prefill=worker.name if reader else None,
            decode=writer.worker.name,
            donor=reading.donor.name if reading.donor else None,
            held_prefill_tokens=reading.held,
            held_decode_tokens=writer.local.held,
            fetched_tokens=reading.fetched,
            terms=terms,
        )
        source = worker if reader else None
        return Weighed(source, writer.worker, reading.missing, reading_s, writer.num_bytes, reading.donor, option)

    # one worker

    def _reader(self, worker: Candidate, role: int) -> Reader:
        config, now, asked, info, standing = self._config, self._now, self._asked, worker.info, worker.standing()
        num_tokens, last = asked.num_tokens, asked.last
        held = readable(asked.held.get(worker.key, 0), num_tokens, info.page_size)
        missing = num_tokens - held
        queue_s = config.queue * standing.queue_s(now)
        prefill_s = config.prefill * worker.steps.prefill_s(missing, held, info.chunk_tokens)
        crowding_s = config.crowding * standing.expected_wait_s(now)
        followers_s = self._followers * prefill_s
        # Each of the session's last two workers is worth half of it.
        affinity_s = -config.affinity_s / 2 if last is not None and last[role] == worker.key else 0.0
        total_s = queue_s + prefill_s + crowding_s + followers_s + affinity_s
        chunks = num_chunks(missing, info.chunk_tokens)
        terms = queue_s, prefill_s, crowding_s, followers_s, affinity_s
        return Reader(worker, held, missing, chunks, *terms, total_s, 0.0, None, 0)

    def _donors(self, sources: Sequence[Candidate], targets: Sequence[Candidate]) -> list[Donor]:
        return rank_donors([*sources, *targets, *self._asked.leaving], self._asked.told)

    def _fetching(self, reader: Reader, donors: Sequence[Donor]) -> Reader | None:
        """The same worker, fetching what the best donor holds beyond it while the prompts before are read.

        What those behind it wait is counted as if it computed all: a copy takes the place of other prompts' blocks,
        which are computed again in its stead. Without that, prefixes spread until all caches hold the same.
        """
        config, worker, info = self._config, reader.worker, reader.worker.info
        found = find_donor(worker, reader.held, self._asked.num_tokens, donors)
        if found is None:
            return None
        donor, fetched = found
        fixed_s, byte_s = self._transfers.link(donor.key, worker.key)
        moving_s = fixed_s + byte_s * (fetched // info.page_size * info.block_bytes)
        fetch_s = config.transfer * max(moving_s - worker.standing().queue_s(self._now), 0.0)
        there, missing = reader.held + fetched, reader.missing - fetched
        prefill_s = config.prefill * worker.steps.prefill_s(missing, there, info.chunk_tokens)
        total_s = reader.queue_s + prefill_s + reader.crowding_s + reader.followers_s + reader.affinity_s
        return reader._replace(
            missing=missing,
            chunks=num_chunks(missing, info.chunk_tokens),
            prefill_s=prefill_s,
            total_s=total_s + fetch_s,
            fetch_s=fetch_s,
            donor=donor,
            fetched=fetched,
        )

    def _writer(self, worker: Candidate) -> Writer:
        """The sequence's own steps get longer by its neighbours, theirs by it."""
        config, info, standing = self._config, worker.info, worker.standing()
        num_tokens, output_tokens, *_ = self._asked
        local = self._reader(worker, 1)
        step_s, decode_row_s, decode_token_s = worker.steps.coefficients[3:]
        row_s = decode_row_s + decode_token_s * num_tokens
        alone_s = step_s + row_s
        crowd = max(standing.rows, standing.arrivals_per_s(self._now) * output_tokens * alone_s)  # Little's law
        slower_s = decode_row_s * crowd + decode_token_s * standing.kv_tokens
        itl_s = config.itl * output_tokens * (slower_s + crowd * row_s)
        num_pages = -(-num_tokens // info.page_size)
        stall_s = config.itl * standing.rows * local.prefill_s
        num_bytes = (num_pages - local.held // info.page_size) * info.block_bytes
        return Writer(worker, local, num_bytes, itl_s, stall_s, local.affinity_s, itl_s + local.affinity_s)

    def _may_read(self, writer: Writer) -> bool:
        limit = self._config.local_prefill_tokens
        return limit < 0 or writer.local.missing <= limit

    # pairs

    def _pair(self, reader: Reader, writer: Writer) -> Choice | None:
        """None where the two must not exchange KV."""
        if reader.worker.info.fingerprint != writer.worker.info.fingerprint:
            return None
        transfer_s = self._config.transfer * self._transfer_s(reader, writer)
        total_s = reader.total_s + writer.total_s + transfer_s
        return Choice((total_s, reader.worker.turn + writer.worker.turn), reader, writer, transfer_s)

    def _local(self, writer: Writer) -> Choice:
        total_s = writer.local.total_s + writer.total_s + writer.stall_s
        return Choice((total_s, 2 * writer.worker.turn), None, writer, 0.0)

    def _transfer_s(self, reader: Reader, writer: Writer) -> float:
        """What of a hand-over is left when prefill ends: its last chunk, or all that prefill was too short to hide."""
        fixed_s, byte_s = self._transfers.link(reader.worker.key, writer.worker.key)
        moving_s = byte_s * writer.num_bytes
        hidden_s = reader.prefill_s * (1 - 1 / reader.chunks)
        return fixed_s + max(moving_s / reader.chunks, moving_s - hidden_s)


def readable(held: int, num_tokens: int, page_size: int) -> int:
    """Of the tokens held, those that need not be computed: the last one is, for its logits."""
    return min(held, (num_tokens - 1) // page_size * page_size)


def mean_busy(workers: Sequence[Candidate], now: float) -> float:
    """Of those that read prompts."""
    total = 0.0
    for worker in workers:  # `sum` rounds otherwise, and differently from version to version
        total += worker.standing().busy(now)
    return total / len(workers)


def num_followers(busy: float) -> float:
    """Seconds that others wait for each second of prefill that is added to a worker with so much of it.

    Where arrivals wait for `busy / (1 - busy) / 2` mean prompts, as in `Standing.expected_wait_s`, all of them together
    wait `busy ** 2 / (1 - busy) / 2` seconds per second; this is its derivative.
    """
    idle = 1 - busy
    return 0.5 * busy * (2 - busy) / (idle * idle)


def _order(choice: Choice) -> tuple[int, int]:
    total_s, turn = choice.key
    return round(total_s / SAME_S), turn
