"""Where each session's last request went: a hint for placement when the index does not know better."""

from __future__ import annotations

from collections import OrderedDict

MAX_SESSIONS = 65536
SESSION_S = 600.0

WorkerKey = tuple[str, int]
Pair = tuple[WorkerKey | None, WorkerKey]


class Sessions:
    """Forgets the least recently used, and those that are quiet for long."""

    def __init__(self) -> None:
        self._pairs: OrderedDict[str, tuple[Pair, float]] = OrderedDict()

    def last(self, session: str | None, now: float) -> Pair | None:
        """Prefill and decode worker of the session's last request."""
        found = self._pairs.get(session) if session is not None else None
        return found[0] if found is not None and now - found[1] < SESSION_S else None

    def went(self, session: str | None, pair: Pair, now: float) -> None:
        """A request of this session was placed."""
        if session is None:
            return
        self._pairs[session] = (pair, now)
        self._pairs.move_to_end(session)
        if len(self._pairs) > MAX_SESSIONS:
            self._pairs.popitem(last=False)
