"""Which workers a request goes to: the pair with the least predicted delay, from the global index and learned costs.

Weighed are all pairs (p, d) of a prefill and a decode worker that may exchange KV; the same with a donor, from which p
fetches leading blocks that it lacks; and (d, d), where the decode worker reads the prompt itself. A pair's cost is the
sum of `decision.Terms`; all terms are soft. Hard filters: fingerprint, draining, breaker, and (while there are others)
silence and a failure of this very request.

Plain Python without I/O; choose and reserve are one step.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence

from engine_core.block_hash import BlockHasher, Keys
from engine_core.errors import NoWorkerAvailable
from engine_core.messages import WorkerInfo
from engine_core.types import Request
from router.block_index import BlockIndex
from router.breaker import BreakerState
from router.candidate import Candidate, Work
from router.compiled.hashing import CompiledHasher
from router.compiled.library import Compiled
from router.compiled.ranking import CompiledRanking
from router.cost_model import Average, TransferModel, num_chunks
from router.decision import Decision
from router.pair_costs import Asked, PairCosts, PlacementConfig, Ranking, Weighed, mean_busy
from router.pair_matrix import PairMatrix
from router.sessions import Sessions

__all__ = ["JointPlacement", "Placement", "PlacementConfig"]

MAX_HASHERS = 256
SMALL = 64  # pairs that are weighed one by one
FIRST_OUTPUT_TOKENS = 64.0

WorkerKey = tuple[str, int]


class Placement:
    """A reservation on the workers of one attempt; every release is idempotent.

    Attributes:
        prefill: None where the decode worker reads the prompt itself.
        donor: who has said that it holds `donor_blocks` leading blocks, more than the prefill worker; None: not wanted.
        decision: why.
        prefill_tokens: to be computed.
        transfer_bytes: KV that the decode worker is expected to lack; 0 for local prefill.
    """

    __slots__ = (
        "_number",
        "decision",
        "decode",
        "donor",
        "donor_blocks",
        "prefill",
        "prefill_tokens",
        "transfer_bytes",
    )

    def __init__(
        self,
        number: int,
        prefill: Candidate | None,
        decode: Candidate,
        decision: Decision,
        *,
        prefill_tokens: int,
        transfer_bytes: int,
        donor: Candidate | None,
        donor_blocks: int,
    ) -> None:
        self._number = number
        self.prefill = prefill
        self.decode = decode
        self.donor = donor
        self.donor_blocks = donor_blocks
        self.decision = decision
        self.prefill_tokens = prefill_tokens
        self.transfer_bytes = transfer_bytes

    def release_prefill(self, now: float) -> None:
        """The prompt has been read."""
        (self.prefill or self.decode).release_prefill(self._number, now)

    def release(self, now: float) -> None:
        """The attempt is over."""
        for worker in (self.prefill, self.decode):
            if worker is not None:
                worker.release(self._number, now)
                worker.breaker.abandoned()


class JointPlacement:
    """See the module.

    Args:
        index: the global index; shared with the feeds that fill it.
        transfers: what hand-overs take; shared with whoever measures them.
        compiled: computes the costs; None: Python and NumPy do.
    """

    def __init__(
        self, index: BlockIndex, transfers: TransferModel, config: PlacementConfig, compiled: Compiled | None
    ) -> None:
        self._index = index
        self._transfers = transfers
        self._config = config
        self._sessions = Sessions()
        self._hash = compiled.hash if compiled is not None else None
        self._hashers: dict[tuple[int, bytes, str], BlockHasher | CompiledHasher] = {}
        self._kinds: set[tuple[int, str]] = set()  # of block hashes, of the workers that were last placed on
        self._kinds_of: list[WorkerInfo] = []
        self._numbers = itertools.count(1)
        self._output_tokens = Average(FIRST_OUTPUT_TOKENS, 64)
        self._matrix = PairMatrix(config, transfers)
        self._compiled = CompiledRanking(compiled, config, transfers) if compiled is not None else None

    def place(
        self,
        request: Request,
        prefill: Sequence[Candidate],
        decode: Sequence[Candidate],
        *,
        now: float,
        avoid: Collection[WorkerKey],
        session: str | None,
        donors: bool,
    ) -> Placement:
        """Choose and reserve, in one step: nothing else runs in between.

        Args:
            prefill, decode: the fleet's workers.
            avoid: workers that just failed this request; used only if there are no others.
            session: what the client calls its session, if it does.
            donors: whether the prefill worker may fetch what others hold.

        Raises:
            NoWorkerAvailable: no decode worker is there.
        """
        excluded: dict[str, str] = {}
        sound = _sound(decode, avoid, now, excluded)
        targets = sound or _second_best(decode, avoid)
        if not targets:
            raise NoWorkerAvailable("no decode worker is available")
        scored = request.sampling.prompt_logprobs  # only decode workers have steps for that
        sources = [] if scored else _sound(prefill, avoid, now, excluded)
        keys = self._keys_of(request, [*sources, *targets])
        donors = donors and self._config.donors and bool(sound and sources)
        held, told = self._held(keys, donors)
        left = request.sampling.max_tokens - (len(request.token_ids) - request.num_prompt_tokens)
        asked = Asked(
            len(request.token_ids),
            min(left, self._output_tokens.value),
            held,
            self._sessions.last(session, now),
            told,
            _leaving([*prefill, *decode], avoid) if told and excluded else (),
        )
        ranking = self._rank(asked, sources, targets, now)
        best, *others = ranking.best
        decision = Decision(
            request_id=request.request_id,
            epoch=request.epoch,
            at=now,
            num_tokens=len(request.token_ids),
            chosen=best.option,
            others=tuple([other.option for other in others]),
            num_weighed=ranking.num_weighed,
            excluded=excluded,
        )
        placement = self._reserve(request, best, decision, now)
        source = placement.prefill
        self._sessions.went(session, (source.key if source else None, placement.decode.key), now)
        self._predict(source or placement.decode, keys, held)
        return placement

    def has_room(self, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float) -> bool:
        """Whether a request placed now would begin soon; else it had better wait where order can still be changed."""
        share, backlog_s = 1 + self._config.overcommit, self._config.max_backlog_s
        for worker in decode:
            if worker.usable and worker.num_rows() < share * max(worker.info.num_slots, 1):
                break
        else:
            return False
        for worker in self._readers(prefill, decode):  # noqa: SIM110  # twice as fast as any()
            if worker.queue_s(now) <= backlog_s:
                return True
        return False

    def least_queue_s(self, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float) -> float:
        """Seconds of prompts before a new one, at the worker with the fewest."""
        return min((worker.queue_s(now) for worker in self._readers(prefill, decode)), default=0.0)

    def _readers(self, prefill: Sequence[Candidate], decode: Sequence[Candidate]) -> Iterator[Candidate]:
        """Where a prompt could be read."""
        none_yet = True
        for worker in prefill:
            if worker.usable:
                none_yet = False
                yield worker
        if none_yet or self._config.local_prefill_tokens:
            for worker in decode:
                if worker.usable:
                    yield worker

    def handed_over(self, placement: Placement, seconds: float) -> None:
        """The decode worker's first token came so long after the prefill worker's."""
        source, target = placement.prefill, placement.decode
        if source is None:
            return
        rows = target.num_rows()
        if rows > target.info.num_slots:  # it may have waited for a slot
            return
        waited_s = target.steps.decode_s(rows, target.kv_tokens(rows))
        chunks = max(1, num_chunks(placement.prefill_tokens, source.info.chunk_tokens))
        self._transfers.learn(source.key, target.key, placement.transfer_bytes // chunks, max(0.0, seconds - waited_s))

    def network_s(self, placement: Placement) -> float:
        """For how long the KV of a hand-over keeps the network busy, as learned; 0 for local prefill."""
        if placement.prefill is None:
            return 0.0
        return placement.transfer_bytes * self._transfers.link(placement.prefill.key, placement.decode.key)[1]

    def expected_tokens(self, request: Request) -> float:
        """Of prompt and answer."""
        return len(request.token_ids) + min(float(request.sampling.max_tokens), self._output_tokens.value)

    def finished(self, num_output_tokens: int) -> None:
        """A request ended after so many tokens."""
        self._output_tokens.add(num_output_tokens)

    def _rank(self, asked: Asked, sources: Sequence[Candidate], targets: Sequence[Candidate], now: float) -> Ranking:
        if self._compiled is not None:
            return self._compiled.best(sources, targets, asked, now)
        if len(sources) * len(targets) <= SMALL:
            costs = PairCosts(self._config, self._transfers, asked, mean_busy(sources or targets, now), now)
            choices = costs.all(sources, targets)
            return costs.ranking(choices, len(choices))
        best = self._matrix.best(sources, targets, asked, now)
        costs = PairCosts(self._config, self._transfers, asked, best.busy, now)
        return costs.ranking(costs.some(best.pairs, sources, targets), best.num_weighed)

    # the index

    def _keys_of(self, request: Request, workers: Sequence[Candidate]) -> dict[tuple[int, str], Keys]:
        """Hash the prompt, once for each kind of block hash in use: one, as a rule."""
        infos = [worker.info for worker in workers]
        if infos != self._kinds_of:
            self._kinds_of = infos
            self._kinds = {_kind(worker) for worker in workers if worker.info.block_namespace}
        return {kind: self._hasher(kind, request.salt).keys(request.token_ids) for kind in self._kinds}

    def _hasher(self, kind: tuple[int, str], salt: bytes) -> BlockHasher | CompiledHasher:
        page_size, namespace = kind
        hasher = self._hashers.get((page_size, salt, namespace))
        if hasher is None:
            if len(self._hashers) >= MAX_HASHERS:
                self._hashers.clear()
            plain = BlockHasher(page_size, salt, bytes.fromhex(namespace))
            hasher = CompiledHasher(self._hash, plain) if self._hash is not None else plain
            self._hashers[page_size, salt, namespace] = hasher
        return hasher

    def _held(self, keys: dict[tuple[int, str], Keys], donors: bool) -> tuple[dict[Hashable, int], dict[Hashable, int]]:
        """Worker -> leading tokens it holds, and those it has said it holds; a worker that is not in it holds none."""
        held: dict[Hashable, int] = {}
        told: dict[Hashable, int] = {}
        for (page_size, _), of_kind in keys.items():
            depths, said = self._index.match_both(of_kind) if donors else (self._index.match(of_kind), {})
            for worker, depth in depths.items():
                held[worker] = depth * page_size
            for worker, depth in said.items():
                told[worker] = depth * page_size
        return held, told

    def _predict(self, reader: Candidate, keys: dict[tuple[int, str], Keys], held: dict[Hashable, int]) -> None:
        """Prompts are read in the order of placement, so what comes behind this one will find its blocks there.

        Nothing is foretold of a decode worker that waits for them: who reads there would come before they do.
        """
        of_worker = keys.get(_kind(reader))
        if of_worker is not None:
            self._index.predict(reader.key, of_worker[held.get(reader.key, 0) // reader.info.page_size :])

    # the outcome

    def _reserve(self, request: Request, best: Weighed, decision: Decision, now: float) -> Placement:
        number, num_tokens = next(self._numbers), len(request.token_ids)
        source, target, missing, reading_s, num_bytes, donor, option = best
        reading_us = round(1e6 * reading_s)
        if source is None:
            num_bytes = 0
            _reserve(target, number, Work(missing, reading_us, 1, num_tokens), now)
        else:
            _reserve(source, number, Work(missing, reading_us, 0, 0), now)
            _reserve(target, number, Work(0, 0, 1, num_tokens), now)
        donor_blocks = 0
        if donor is not None and source is not None:
            donor.took_turn(number)
            donor_blocks = (option.held_prefill_tokens + option.fetched_tokens) // source.info.page_size
        return Placement(
            number,
            source,
            target,
            decision,
            prefill_tokens=missing,
            transfer_bytes=num_bytes,
            donor=donor,
            donor_blocks=donor_blocks,
        )


def _reserve(worker: Candidate, number: int, work: Work, now: float) -> None:
    worker.reserve(number, work, now)
    worker.breaker.placed(now)


def _sound(
    workers: Sequence[Candidate], avoid: Collection[WorkerKey], now: float, excluded: dict[str, str]
) -> list[Candidate]:
    """Those that nothing speaks against."""
    closed = BreakerState.CLOSED
    sound = [one for one in workers if one.usable and not one.suspect and one.breaker.state is closed]
    if avoid:
        sound = [worker for worker in sound if worker.key not in avoid]
    if len(sound) == len(workers):
        return sound
    objections = [(worker, _objection(worker, avoid, now)) for worker in workers]
    excluded.update((worker.name, objection) for worker, objection in objections if objection)
    return [worker for worker, objection in objections if not objection]


def _second_best(workers: Sequence[Candidate], avoid: Collection[WorkerKey]) -> list[Candidate]:
    """Where none is sound: those that did not fail this request, or else any."""
    usable = [worker for worker in workers if worker.usable]
    return [worker for worker in usable if worker.key not in avoid] or usable


def _leaving(workers: Iterable[Candidate], avoid: Collection[WorkerKey]) -> list[Candidate]:
    """Those that get nothing new, but are there: what they hold is lost when they are gone."""
    return [
        worker
        for worker in workers
        if worker.connected and not worker.usable and not worker.suspect and worker.key not in avoid
    ]


def _objection(worker: Candidate, avoid: Collection[WorkerKey], now: float) -> str:
    if not worker.usable:
        return "draining or not connected"
    if worker.key in avoid:
        return "failed this request"
    if worker.suspect:
        return "silent"
    if not worker.breaker.allows(now):
        return "breaker open"
    return ""


def _kind(worker: Candidate) -> tuple[int, str]:
    return worker.info.page_size, worker.info.block_namespace
