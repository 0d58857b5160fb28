"""Which workers a request goes to: the pair with the least predicted delay, from the global index and learned costs.

Weighed are all pairs (p, d) of a prefill and a decode worker that may exchange KV, and (d, d), where the decode worker
reads the prompt itself. A pair's cost is the sum of `decision.Terms`; all terms are soft. Hard filters: fingerprint,
draining, breaker, and (while there are others) silence and a failure of this very request.

Plain Python and small NumPy matrices, no I/O; choose and reserve are one step.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from engine_core.block_hash import BlockHasher, Keys
from engine_core.errors import NoWorkerAvailable
from engine_core.types import Request
from router.block_index import BlockIndex
from router.candidate import Candidate, Work
from router.cost_model import Average, Floats, TransferModel
from router.decision import Decision, Option, Terms
from router.sessions import Pair, Sessions

NUM_OTHERS = 3  # runners-up kept for people
MAX_UTILIZATION = 0.95
MAX_HASHERS = 256
FIRST_OUTPUT_TOKENS = 64.0
SAME_S = 1e-6  # costs that differ by less are equal

WorkerKey = tuple[str, int]


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


class Placement:
    """A reservation on the workers of one attempt; every release is idempotent.

    Attributes:
        prefill: None where the decode worker reads the prompt itself.
        decision: why.
        prefill_tokens: to be computed.
        transfer_bytes: KV that the decode worker is expected to lack; 0 for local prefill.
    """

    __slots__ = ("_number", "decision", "decode", "prefill", "prefill_tokens", "transfer_bytes")

    def __init__(
        self,
        number: int,
        prefill: Candidate | None,
        decode: Candidate,
        decision: Decision,
        *,
        prefill_tokens: int,
        transfer_bytes: int,
    ) -> None:
        self._number = number
        self.prefill = prefill
        self.decode = decode
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


@dataclass(frozen=True, slots=True)
class _Readers:
    """Workers that could read this prompt, each `[n]`: what they hold and would compute (tokens), and their costs."""

    workers: Sequence[Candidate]
    held: list[int]
    missing: list[int]
    queue_s: Floats
    prefill_s: Floats
    crowding_s: Floats


@dataclass(frozen=True, slots=True)
class _Writers:
    """Workers that could generate the answer, each `[n]`; `rows` are sequences that decode there now."""

    workers: Sequence[Candidate]
    rows: Floats
    slot_wait_s: Floats
    itl_s: Floats


@dataclass(frozen=True, slots=True)
class _Options:
    """All pairs: row `i` is source `i`, the last row is the decode worker itself; `inf` where that cannot be.

    Attributes:
        total_s, transfer_s, affinity_s: `[len(sources) + 1, len(targets)]`.
        stall_s: `[len(targets)]`, what local prefill adds to the neighbours' steps.
    """

    sources: _Readers
    locals: _Readers
    targets: _Writers
    total_s: Floats
    transfer_s: Floats
    affinity_s: Floats
    stall_s: Floats

    def terms(self, row: int, column: int) -> Terms:
        """Of one pair."""
        is_local = row == len(self.sources.workers)
        readers, at = (self.locals, column) if is_local else (self.sources, row)
        return Terms(
            queue_s=float(readers.queue_s[at]),
            prefill_s=float(readers.prefill_s[at]),
            transfer_s=float(self.transfer_s[row, column]),
            slot_wait_s=float(self.targets.slot_wait_s[column]),
            itl_s=float(self.targets.itl_s[column] + (self.stall_s[column] if is_local else 0.0)),
            crowding_s=float(readers.crowding_s[at]),
            affinity_s=float(self.affinity_s[row, column]),
        )

    def option(self, row: int, column: int) -> Option:
        """For people."""
        is_local = row == len(self.sources.workers)
        return Option(
            prefill=None if is_local else self.sources.workers[row].name,
            decode=self.targets.workers[column].name,
            held_prefill_tokens=self.locals.held[column] if is_local else self.sources.held[row],
            held_decode_tokens=self.locals.held[column],
            terms=self.terms(row, column),
        )

    def ranked(self) -> list[tuple[int, int]]:
        """Cheapest pair first, then some of the next; of equals the one that waited longest for its turn."""
        total_s = self.total_s.reshape(-1)
        count = min(1 + NUM_OTHERS, len(total_s))
        nearest = np.argpartition(total_s, count - 1)[:count] if count < len(total_s) else np.arange(count)
        equal = np.flatnonzero(total_s <= total_s[nearest].min() + SAME_S)
        width = len(self.targets.workers)
        pairs = [divmod(at, width) for at in {*nearest.tolist(), *equal.tolist()} if total_s[at] < np.inf]
        best_s = float(total_s[nearest].min()) + SAME_S
        pairs.sort(key=lambda pair: (max(float(self.total_s[pair]), best_s), self._turn(*pair)))
        return pairs[: 1 + NUM_OTHERS]

    def _turn(self, row: int, column: int) -> int:
        turn = self.targets.workers[column].turn
        return turn + (self.sources.workers[row].turn if row < len(self.sources.workers) else turn)


class JointPlacement:
    """See the module.

    Args:
        index: the global index; shared with the feeds that fill it.
        transfers: what hand-overs take; shared with whoever measures them.
    """

    def __init__(self, index: BlockIndex, transfers: TransferModel, config: PlacementConfig) -> None:
        self._index = index
        self._transfers = transfers
        self._config = config
        self._sessions = Sessions()
        self._hashers: dict[tuple[int, bytes, str], BlockHasher] = {}
        self._numbers = itertools.count(1)
        self._output_tokens = Average(FIRST_OUTPUT_TOKENS, 64)

    def place(
        self,
        request: Request,
        prefill: Sequence[Candidate],
        decode: Sequence[Candidate],
        *,
        now: float,
        avoid: Collection[WorkerKey],
        session: str | None,
    ) -> Placement:
        """Choose and reserve, in one step: nothing else runs in between.

        Args:
            prefill, decode: the fleet's workers.
            avoid: workers that just failed this request; used only if there are no others.
            session: what the client calls its session, if it does.

        Raises:
            NoWorkerAvailable: no decode worker is there.
        """
        excluded: dict[str, str] = {}
        targets = _sound(decode, avoid, now, excluded) or _second_best(decode, avoid)
        if not targets:
            raise NoWorkerAvailable("no decode worker is available")
        sources = _sound(prefill, avoid, now, excluded)
        keys = self._keys_of(request, [*sources, *targets])
        held = self._held(keys, len(request.token_ids))
        options = self._weigh(request, sources, targets, held, now, self._sessions.last(session, now))
        placement = self._reserve(request, options, excluded, now)
        source = placement.prefill
        self._sessions.went(session, (source.key if source else None, placement.decode.key), now)
        chosen = [placement.decode] if source is None else [source, placement.decode]
        for worker in chosen:
            of_worker = keys.get(_kind(worker))
            if of_worker is not None:
                self._index.predict(worker.key, of_worker[held.get(worker.key, 0) // worker.info.page_size :])
        return placement

    def has_room(self, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float) -> bool:
        """Whether a request placed now would begin soon; else it had better wait where order can still be changed."""
        config = self._config
        if not any(
            worker.usable and worker.num_rows() < (1 + config.overcommit) * max(worker.info.num_slots, 1)
            for worker in decode
        ):
            return False
        readers = [worker for worker in prefill if worker.usable]
        if not readers or config.local_prefill_tokens:
            readers += [worker for worker in decode if worker.usable]
        return any(worker.queue_s(now) <= config.max_backlog_s for worker in readers)

    def handed_over(self, placement: Placement, seconds: float) -> None:
        """The decode worker's first token came so long after the prefill worker's."""
        source, target = placement.prefill, placement.decode
        if source is None:
            return
        rows = target.num_rows()
        if rows > target.info.num_slots:  # it may have waited for a slot
            return
        waited_s = target.steps.decode_s(rows, target.kv_tokens(rows))
        chunks = num_chunks(source, placement.prefill_tokens)
        self._transfers.learn(source.key, target.key, placement.transfer_bytes // chunks, max(0.0, seconds - waited_s))

    def expected_tokens(self, request: Request) -> float:
        """Of prompt and answer."""
        return len(request.token_ids) + min(float(request.sampling.max_tokens), self._output_tokens.value)

    def finished(self, num_output_tokens: int) -> None:
        """A request ended after so many tokens."""
        self._output_tokens.add(num_output_tokens)

    # the index

    def _keys_of(self, request: Request, workers: Sequence[Candidate]) -> dict[tuple[int, str], Keys]:
        """Hash the prompt, once for each kind of block hash in use: one, as a rule."""
        keys: dict[tuple[int, str], Keys] = {}
        for worker in workers:
            kind = _kind(worker)
            if kind not in keys and worker.info.block_namespace:
                keys[kind] = self._hasher(kind, request.salt).keys(request.token_ids)
        return keys

    def _hasher(self, kind: tuple[int, str], salt: bytes) -> BlockHasher:
        page_size, namespace = kind
        hasher = self._hashers.get((page_size, salt, namespace))
        if hasher is None:
            if len(self._hashers) >= MAX_HASHERS:
                self._hashers.clear()
            hasher = BlockHasher(page_size, salt, bytes.fromhex(namespace))
            self._hashers[page_size, salt, namespace] = hasher
        return hasher

    def _held(self, keys: dict[tuple[int, str], Keys], num_tokens: int) -> dict[object, int]:
        """Worker -> leading tokens it holds; a worker that is not in it holds none."""
        held: dict[object, int] = {}
        for (page_size, _), of_kind in keys.items():
            for worker, depth in self._index.match(of_kind).items():
                held[worker] = depth * page_size
        return held

    # costs

    def _weigh(
        self,
        request: Request,
        sources: Sequence[Candidate],
        targets: Sequence[Candidate],
        held: dict[object, int],
        now: float,
        last: Pair | None,
    ) -> _Options:
        config = self._config
        readers = self._readers(request, sources, held, now)
        locals_ = self._readers(request, targets, held, now)
        writers = self._writers(request, targets, now)
        write_s = writers.slot_wait_s + writers.itl_s
        stall_s = config.itl * writers.rows * locals_.prefill_s
        local_s = locals_.queue_s + locals_.prefill_s + locals_.crowding_s + stall_s + write_s
        transfer_s = np.zeros((len(sources) + 1, len(targets)))
        total_s = np.zeros_like(transfer_s)
        if sources:
            transfer_s[:-1] = config.transfer * self._transfer_s(readers, locals_, len(request.token_ids))
            total_s[:-1] = (readers.queue_s + readers.prefill_s + readers.crowding_s)[:, None] + write_s
            total_s += transfer_s
            _forbid_strangers(total_s, sources, targets)
        total_s[-1] = local_s
        if config.local_prefill_tokens >= 0 and np.isfinite(total_s[:-1]).any():
            total_s[-1, np.array(locals_.missing) > config.local_prefill_tokens] = np.inf
        affinity_s = _affinity(sources, targets, last, config.affinity_s)
        total_s += affinity_s
        return _Options(readers, locals_, writers, total_s, transfer_s, affinity_s, stall_s)

    def _readers(self, request: Request, workers: Sequence[Candidate], held: dict[object, int], now: float) -> _Readers:
        config = self._config
        num_tokens = len(request.token_ids)
        hits, missing, queue_s, prefill_s, crowding_s = [], [], [], [], []
        for worker in workers:
            info = worker.info
            known = held.get(worker.key, 0)
            if known >= num_tokens:  # the last block at the least is computed, for its logits
                known = (num_tokens - 1) // info.page_size * info.page_size
            hits.append(known)
            missing.append(num_tokens - known)
            queue_s.append(worker.queue_s(now))
            prefill_s.append(worker.steps.prefill_s(num_tokens - known, known, info.chunk_tokens))
            crowding_s.append(_expected_wait(worker, now))
        return _Readers(
            workers=workers,
            held=hits,
            missing=missing,
            queue_s=config.queue * np.array(queue_s),
            prefill_s=config.prefill * np.array(prefill_s),
            crowding_s=config.crowding * np.array(crowding_s),
        )

    def _writers(self, request: Request, workers: Sequence[Candidate], now: float) -> _Writers:
        """The sequence's own steps get longer by its neighbours, theirs by it; a full worker makes it wait."""
        config, num_tokens = self._config, len(request.token_ids)
        left = request.sampling.max_tokens - (num_tokens - request.num_prompt_tokens)
        output_tokens = min(left, self._output_tokens.value)
        rows, waits, growths = [], [], []
        for worker in workers:
            info = worker.info
            per_step, per_row, per_token = worker.steps.coefficients[3:]
            num_rows = worker.num_rows()
            alone_s = per_step + per_row + per_token * num_tokens
            crowd = max(num_rows, worker.arrivals(now) * output_tokens * alone_s)  # Little's law
            kv_tokens = worker.kv_tokens(num_rows)
            slower_s = per_row * crowd + per_token * kv_tokens
            growths.append(output_tokens * (slower_s + crowd * (per_row + per_token * num_tokens)))
            over = max(0, num_rows + 1 - info.num_slots) / max(info.num_slots, 1)
            over = max(over, worker.missing_pages(-(-num_tokens // info.page_size)) / max(info.num_pages, 1))
            waits.append(over * self._output_tokens.value * (alone_s + slower_s))
            rows.append(num_rows)
        return _Writers(
            workers, np.array(rows, float), config.slot_wait * np.array(waits), config.itl * np.array(growths)
        )

    def _transfer_s(self, sources: _Readers, targets: _Readers, num_tokens: int) -> Floats:
        """`[p, d]`: what of the hand-over is left when prefill ends: at the least, its last chunk."""
        fixed_s, byte_s = self._transfers.coefficients(
            [worker.key for worker in sources.workers], [worker.key for worker in targets.workers]
        )
        num_bytes = [
            transfer_bytes(worker, known, num_tokens)
            for worker, known in zip(targets.workers, targets.held, strict=True)
        ]
        chunks = np.array(
            [num_chunks(worker, missing) for worker, missing in zip(sources.workers, sources.missing, strict=True)]
        )
        moving_s = byte_s * np.array(num_bytes, float)
        overlapped_s = sources.prefill_s * (1 - 1 / chunks)
        left_s: Floats = np.maximum(moving_s / chunks[:, None], moving_s - overlapped_s[:, None])
        return left_s + fixed_s

    # the outcome

    def _reserve(self, request: Request, options: _Options, excluded: dict[str, str], now: float) -> Placement:
        number = next(self._numbers)
        num_tokens = len(request.token_ids)
        ranked = options.ranked()
        row, column = ranked[0]
        decision = Decision(
            request_id=request.request_id,
            epoch=request.epoch,
            at=now,
            num_tokens=num_tokens,
            chosen=options.option(row, column),
            others=tuple(options.option(*pair) for pair in ranked[1:]),
            num_weighed=int(np.isfinite(options.total_s).sum()),
            excluded=excluded,
        )
        target = options.targets.workers[column]
        held = options.locals.held[column]
        source: Candidate | None = None
        if row == len(options.sources.workers):
            reading = _reading(target, held, num_tokens)
            _reserve(target, number, reading._replace(rows=1, kv_tokens=num_tokens), now)
        else:
            source = options.sources.workers[row]
            reading = _reading(source, options.sources.held[row], num_tokens)
            _reserve(source, number, reading, now)
            _reserve(target, number, Work(0, 0, 1, num_tokens), now)
        moved = transfer_bytes(target, held, num_tokens) if source else 0
        return Placement(number, source, target, decision, prefill_tokens=reading.prefill_tokens, transfer_bytes=moved)


def _reserve(worker: Candidate, number: int, work: Work, now: float) -> None:
    worker.reserve(number, work, now)
    worker.breaker.placed(now)
    worker.turn = number


def _reading(worker: Candidate, held: int, num_tokens: int) -> Work:
    seconds = worker.steps.prefill_s(num_tokens - held, held, worker.info.chunk_tokens)
    return Work(num_tokens - held, round(1e6 * seconds), 0, 0)


def _forbid_strangers(total_s: Floats, sources: Sequence[Candidate], targets: Sequence[Candidate]) -> None:
    """Workers of unequal fingerprints never exchange KV."""
    if len({worker.info.fingerprint for worker in (*sources, *targets)}) > 1:
        for row, source in enumerate(sources):
            for column, target in enumerate(targets):
                if source.info.fingerprint != target.info.fingerprint:
                    total_s[row, column] = np.inf


def _affinity(sources: Sequence[Candidate], targets: Sequence[Candidate], last: Pair | None, worth_s: float) -> Floats:
    """Negative where the session's last request went: half for each of the two workers."""
    affinity_s = np.zeros((len(sources) + 1, len(targets)))
    if last is not None:
        for row, source in enumerate(sources):
            affinity_s[row] -= worth_s / 2 * (source.key == last[0])
        for column, target in enumerate(targets):
            affinity_s[:, column] -= worth_s / 2 * (target.key == last[1])
        affinity_s[-1] *= 2  # the decode worker alone is the whole pair
    return affinity_s


def num_chunks(worker: Candidate, num_tokens: int) -> int:
    """Steps in which a prefill worker computes so many tokens."""
    return max(1, -(-num_tokens // worker.info.chunk_tokens)) if worker.info.chunk_tokens else 1


def transfer_bytes(worker: Candidate, held_tokens: int, num_tokens: int) -> int:
    """KV bytes of a prompt that a decode worker lacks."""
    page_size = worker.info.page_size
    return (-(-num_tokens // page_size) - held_tokens // page_size) * worker.info.block_bytes


def _sound(
    workers: Sequence[Candidate], avoid: Collection[WorkerKey], now: float, excluded: dict[str, str]
) -> list[Candidate]:
    """Those that nothing speaks against."""
    sound = []
    for worker in workers:
        objection = _objection(worker, avoid, now)
        if objection:
            excluded[worker.name] = objection
        else:
            sound.append(worker)
    return sound


def _second_best(workers: Sequence[Candidate], avoid: Collection[WorkerKey]) -> list[Candidate]:
    """Where none is sound: those that did not fail this request, or else any."""
    usable = [worker for worker in workers if worker.usable]
    return [worker for worker in usable if worker.key not in avoid] or usable


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


def _kind(worker: Candidate) -> tuple[int, str]:
    return worker.info.page_size, worker.info.block_namespace
