"""What the failed attempts of a stream say: of the error a worker had, and of the request itself."""

from __future__ import annotations

from collections.abc import Iterator

from engine_core.errors import BatonError, Overloaded, WorkerDied, WorkerSilent
from engine_core.messages import Failed

WorkerKey = tuple[str, int]
SUSPECT_DEATHS = 2
PATIENCE_S = 5.0  # for lost connections: a link may be bad for a while, and workers take a moment to be back


class FailureRecord:
    """Of one stream.

    Attributes:
        num_futile: attempts in a row that ended without a new token.
        victims: workers lost at one and the same token of the stream: each may have died of it.
    """

    __slots__ = ("_futile_since", "_position", "num_futile", "victims")

    def __init__(self) -> None:
        self.num_futile = 0
        self.victims: list[WorkerKey] = []
        self._position = 0
        self._futile_since = 0.0

    def note(self, began_at: int, position: int, error: BatonError, culprit: WorkerKey | None, now: float) -> None:
        """An attempt that began at token `began_at` ended before token `position` came."""
        self.num_futile = 1 if position > began_at else self.num_futile + 1
        if self.num_futile == 1:
            self._futile_since = now
        if position != self._position:
            self.victims.clear()
        self._position = position
        if culprit is not None and isinstance(error, WorkerDied) and not isinstance(error, WorkerSilent):
            self.victims.append(culprit)

    def is_hopeless(self, max_attempts: int, error: BatonError, now: float) -> bool:
        """Whether so many attempts in a row were futile; where connections were lost, also for long enough."""
        is_early = isinstance(error, WorkerDied) and now - self._futile_since < PATIENCE_S
        return self.num_futile >= max_attempts and not is_early

    @property
    def is_suspect(self) -> bool:
        """Whether the request may be what workers die of."""
        return len(self.victims) >= SUSPECT_DEATHS


def error_of(message: Failed) -> BatonError:
    """The exception that the worker had."""
    by_code = {kind.code: kind for kind in _subclasses(BatonError) if kind is not Overloaded}
    kind = by_code.get(message.code, BatonError)
    error = kind(message.message)
    error.code = message.code
    error.retryable = message.retryable
    return error


def _subclasses(kind: type[BatonError]) -> Iterator[type[BatonError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _subclasses(child)
