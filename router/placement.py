"""Which workers a request goes to: least load. The global index and the cost model fill the same seam later."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from engine_core.errors import NoWorkerAvailable
from engine_core.types import Request
from router.registry import Registry, WorkerState

LoadOf = Callable[[WorkerState], float]


class Placement:
    """A reservation on the workers of one attempt; released exactly once, whatever happens.

    Attributes:
        prefill: None where the decode worker reads the prompt itself.
        terms: what was compared, for people: by name, of the pair that was chosen.
    """

    __slots__ = ("_holds_prefill", "_released", "_tokens", "decode", "prefill", "terms")

    def __init__(
        self, prefill: WorkerState | None, decode: WorkerState, num_tokens: int, terms: dict[str, float]
    ) -> None:
        self.terms = terms
        self.prefill = prefill
        self.decode = decode
        self._tokens = num_tokens
        self._released = False
        self._holds_prefill = prefill is not None
        if prefill is not None:
            _reserve(prefill, num_tokens)
            _reserve(decode, 0)
        else:
            _reserve(decode, num_tokens)

    def release_prefill(self) -> None:
        """The prompt has been read and handed over."""
        if self._holds_prefill and self.prefill is not None:
            self._holds_prefill = False
            _release(self.prefill, self._tokens)

    def release(self) -> None:
        """The attempt is over."""
        if self._released:
            return
        self._released = True
        self.release_prefill()
        _release(self.decode, 0 if self.prefill is not None else self._tokens)


def _reserve(worker: WorkerState, tokens: int) -> None:
    worker.reserved_requests += 1
    worker.reserved_tokens += tokens
    worker.placed_requests += 1
    worker.placed_tokens += tokens


def _release(worker: WorkerState, tokens: int) -> None:
    worker.reserved_requests -= 1
    worker.reserved_tokens -= tokens


class LeastLoad:
    """Prefill: fewest prompt tokens waiting. Decode: fewest requests per slot.

    A worker's load is what it said last and what was placed since, or what this gateway alone has there if more.

    Args:
        local_prefill_tokens: prompts of at most so many tokens are read by the decode worker itself.
    """

    def __init__(self, registry: Registry, local_prefill_tokens: int) -> None:
        self._registry = registry
        self._local_prefill_tokens = local_prefill_tokens
        self._turn = 0

    def place(self, request: Request, avoid: Collection[WorkerState] = ()) -> Placement:
        """Choose and reserve, in one step: nothing else runs in between.

        Args:
            avoid: workers that just failed this request; used only if there are no others.

        Raises:
            NoWorkerAvailable: no decode worker is there.
        """
        registry = self._registry
        decode = _least(registry.decode, _decode_load, avoid)
        if decode is None:
            raise NoWorkerAvailable("no decode worker is available")
        prefill = None
        if registry.prefill and len(request.token_ids) > self._local_prefill_tokens:
            fingerprint = decode.info.fingerprint
            fitting = [worker for worker in registry.prefill if worker.info.fingerprint == fingerprint]
            prefill = _least(fitting, _prefill_load, avoid)
        self._turn += 1
        decode.turn = self._turn
        if prefill is not None:
            prefill.turn = self._turn
        terms = {"decode_requests_per_slot": _decode_load(decode)}
        if prefill is not None:
            terms["prefill_tokens_ahead"] = _prefill_load(prefill)
        return Placement(prefill, decode, len(request.token_ids), terms)


def _prefill_load(worker: WorkerState) -> float:
    load = worker.load
    told = load.queued_tokens + worker.placed_tokens if load else 0
    return max(worker.reserved_tokens, told)


def _decode_load(worker: WorkerState) -> float:
    load = worker.load
    told = load.running + load.waiting + worker.placed_requests if load else 0
    return max(worker.reserved_requests, told) / max(worker.info.num_slots, 1)


def _least(workers: Iterable[WorkerState], load_of: LoadOf, avoid: Collection[WorkerState]) -> WorkerState | None:
    best: WorkerState | None = None
    best_key: tuple[bool, float, int] | None = None
    for worker in workers:
        key = (worker.suspect or worker in avoid, load_of(worker), worker.turn)
        if best_key is None or key < best_key:
            best, best_key = worker, key
    return best
