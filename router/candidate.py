"""One life of one worker as placement sees it: who it is, what it said, what was placed on it, how fast it is.

Plain data without I/O; time is an argument. Reservations are entries that are added once and removed once, and sums
over them are integers: they cannot drift.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from engine_core.messages import Load, WorkerInfo
from router.breaker import Breaker
from router.cost_model import Average, StepModel
from router.pool_model import DecodeCosts
from router.standing import WINDOW_S, Standing


class Work(NamedTuple):
    """What one request reserves on a worker. All integers.

    Attributes:
        prefill_tokens: prompt tokens to compute here.
        prefill_us: how long that takes, predicted.
        rows: 1 where it will decode here.
        kv_tokens: of the sequence when it begins to decode.
    """

    prefill_tokens: int
    prefill_us: int
    rows: int
    kv_tokens: int


class Recent:
    """A sum that decays: what was added during about the last `WINDOW_S` seconds.

    Attributes:
        total: as it was at `at`.
    """

    __slots__ = ("at", "total")

    def __init__(self) -> None:
        self.total = 0.0
        self.at = 0.0

    def add(self, amount: float, now: float) -> None:
        """Count `amount`."""
        self.total = self.total * math.exp((self.at - now) / WINDOW_S) + amount
        self.at = now


class Candidate:
    """See the module.

    Attributes:
        key: (worker_id, incarnation).
        connected: whether it may donate, at least.
        usable: whether it may get new requests, too: not draining.
        suspect: silent for longer than it should be.
        load: its last beat, heard at `load_at`.
        reserved_requests, reserved_tokens: of this gateway's requests there (tokens: prompts not read yet).
        latest: what `standing` returned last; None: it has changed since.
        turn: number of the last placement; breaks ties.
    """

    __slots__ = (
        "_gone_rows",
        "_head_since",
        "_kv_tokens",
        "_prefill_us",
        "_recent_rows",
        "_recent_s",
        "_rows",
        "_unheard",
        "_unheard_rows",
        "_unheard_us",
        "_work",
        "breaker",
        "connected",
        "info",
        "key",
        "latest",
        "load",
        "load_at",
        "mean_prefill_s",
        "reserved_tokens",
        "steps",
        "suspect",
        "turn",
        "usable",
    )

    def __init__(self, info: WorkerInfo, steps: StepModel) -> None:
        self.info = info
        self.key = (info.worker_id, info.incarnation)
        self.steps = steps
        self.breaker = Breaker()
        self.connected = False
        self.usable = False
        self.suspect = False
        self.load: Load | None = None
        self.load_at = 0.0
        self.mean_prefill_s = Average(0.0, 16)
        self.turn = 0
        self.reserved_tokens = 0
        self._work: dict[int, Work] = {}  # prompts to read, in the order of placement: the first is being read
        self._head_since = 0.0
        self._prefill_us = 0
        self._rows: dict[int, Work] = {}
        self._kv_tokens = 0
        self._unheard: dict[int, Work] = {}  # placed since the last beat, which cannot know of it
        self._unheard_us = 0
        self._unheard_rows = 0
        self._gone_rows = 0  # that ended since the last beat, which still counts them
        self._recent_s = Recent()
        self._recent_rows = Recent()
        self.latest: Standing | None = None

    @property
    def name(self) -> str:
        """For logs, metrics and people."""
        return f"{self.info.worker_id}.{self.info.incarnation}"

    @property
    def reserved_requests(self) -> int:
        """Requests of this gateway that hold something here."""
        return len(self._work.keys() | self._rows.keys())

    def reserve(self, number: int, work: Work, now: float) -> None:
        """Enter a request under a number that nothing here has."""
        self.latest = None
        self.turn = number
        if work.prefill_tokens:
            if not self._work:
                self._head_since = now
            self._work[number] = work
            self.reserved_tokens += work.prefill_tokens
            self._prefill_us += work.prefill_us
            self._recent_s.add(work.prefill_us / 1e6, now)
            self.mean_prefill_s.add(work.prefill_us / 1e6)
        if work.rows:
            self._rows[number] = work
            self._kv_tokens += work.kv_tokens
            self._recent_rows.add(1.0, now)
        self._unheard[number] = work
        self._unheard_us += work.prefill_us
        self._unheard_rows += work.rows

    def took_turn(self, number: int) -> None:
        """It donates to the request with that number: of its equals another one is next."""
        self.latest = None
        self.turn = number

    def release_prefill(self, number: int, now: float) -> None:
        """The prompt has been read, or never will be. Again is fine."""
        self.latest = None
        if number in self._work:
            is_head = number == next(iter(self._work))
            work = self._work.pop(number)
            self.reserved_tokens -= work.prefill_tokens
            self._prefill_us -= work.prefill_us
            if is_head:
                self._head_since = now
            unheard = self._unheard.get(number)
            if unheard is not None:
                self._unheard[number] = Work(0, 0, unheard.rows, unheard.kv_tokens)
                self._unheard_us -= work.prefill_us

    def release(self, number: int, now: float) -> None:
        """The request is over here. Again is fine."""
        self.release_prefill(number, now)
        work = self._rows.pop(number, None)
        if work is not None:
            self._kv_tokens -= work.kv_tokens
        unheard = self._unheard.pop(number, None)
        if unheard is not None:
            self._unheard_us -= unheard.prefill_us
            self._unheard_rows -= unheard.rows
        elif work is not None:
            self._gone_rows += 1

    def told(self, load: Load, now: float) -> None:
        """A beat."""
        self.load = load
        self.load_at = now
        self._hear()

    def lost(self) -> None:
        """The connection ended: what it said says nothing any more."""
        self.load = None
        self._hear()

    def _hear(self) -> None:
        self.latest = None
        self._unheard.clear()
        self._unheard_us = self._unheard_rows = 0
        self._gone_rows = 0

    def standing(self) -> Standing:
        """What placement weighs of this worker; the same object until something changes."""
        standing = self.latest
        if standing is None:
            standing = self.latest = self._stand()
        return standing

    def _stand(self) -> Standing:
        load, rows = self.load, self.num_rows()
        told_s = -math.inf
        if load is not None and load.queued_tokens:
            told_s = self.steps.prefill_s(load.queued_tokens, 0, self.info.chunk_tokens) + self._unheard_us / 1e6
        head = next(iter(self._work.values()), None)
        recent_s, recent_rows = self._recent_s, self._recent_rows
        return Standing(  # by position: half as long
            self._prefill_us / 1e6,
            head.prefill_us / 1e6 if head else 0.0,
            self._head_since,
            told_s,
            self.load_at,
            recent_s.total,
            recent_s.at,
            self.mean_prefill_s.value,
            rows,
            self.kv_tokens(rows),
            recent_rows.total,
            recent_rows.at,
            self.turn,
        )

    def decode_costs(self) -> DecodeCosts:
        """What its decode steps take, as learned, and what it has room for."""
        step_s, row_s, token_s = self.steps.coefficients[3:]
        info = self.info
        return DecodeCosts(
            step_s=step_s,
            row_s=row_s,
            token_s=token_s,
            num_slots=info.num_slots,
            kv_tokens=info.num_pages * info.page_size,
        )

    def queue_s(self, now: float) -> float:
        """Seconds of prefill that a new prompt would wait for."""
        return self.standing().queue_s(now)

    def num_rows(self) -> int:
        """Sequences that decode here or soon will."""
        load, rows = self.load, len(self._rows)
        if load is None:
            return rows
        told = load.running + load.waiting + self._unheard_rows - self._gone_rows
        return told if told > rows else rows

    def kv_tokens(self, num_rows: int) -> float:
        """KV tokens of so many rows; those of other gateways are taken for average ones of ours."""
        if not self._rows:
            return 0.0
        return self._kv_tokens * max(num_rows / len(self._rows), 1.0)
