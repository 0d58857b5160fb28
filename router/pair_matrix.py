"""The cheapest pairs of a large fleet: the costs of `pair_costs`, of all pairs at once, as arrays.

Only sums are computed here, in as few operations as there can be; the terms of the few pairs found are `PairCosts`' to
tell. What depends on a worker alone is kept in columns, and only those that have changed are written again.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine_core.messages import WorkerInfo
from router.candidate import Candidate
from router.cost_model import TransferModel
from router.donors import find_donor, rank_donors
from router.pair_costs import NUM_RANKED, SAME_S, Asked, Pairing, PlacementConfig, num_followers
from router.sessions import Pair
from router.standing import MAX_UTILIZATION, WINDOW_S, Standing

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_WHOLE = 1e15  # tokens of a chunk where prompts are read in one


class Best(NamedTuple):
    """What was found.

    Attributes:
        pairs: the cheapest, none of which would be cheaper than one of them.
        busy: mean utilization of the workers that read prompts.
        num_weighed: pairs that may be chosen.
    """

    pairs: list[Pairing]
    busy: float
    num_weighed: int


class _Reading(NamedTuple):
    """Per worker `[num_workers] f64`, as in `pair_costs.Reader`."""

    queue_s: Floats
    missing: Floats
    chunks: Floats
    prefill_s: Floats
    total_s: Floats


class _Rows(NamedTuple):
    """Rows of the matrix `[num_rows]`: sources that compute all they lack, then those that could fetch some of it."""

    sources: npt.NDArray[np.int64]
    chunks: Floats
    prefill_s: Floats
    total_s: Floats


class PairMatrix:
    """See the module. Remembers the workers that it was asked about last."""

    def __init__(self, config: PlacementConfig, transfers: TransferModel) -> None:
        self._config = config
        self._transfers = transfers
        self._workers: list[Candidate] = []
        self._split = -1  # so many of them are sources
        self._keys: list[tuple[str, int]] = []
        self._positions: dict[Hashable, int] = {}
        self._known_infos: list[WorkerInfo] = []  # what the columns say; so the next two
        self._known_standings: list[Standing] = []
        self._known_speeds: list[tuple[float, ...]] = []
        self._infos = np.zeros((3, 0))  # rows: tokens of a chunk and of a page, bytes of a block
        self._standings = np.zeros((8, 0))  # rows: see `_column`
        self._speeds = np.zeros((6, 0))  # rows: coefficients of a `StepModel`
        self._strangers: Mask | None = None  # pairs of unequal fingerprints; None: there are none
        self._links = np.zeros(()), np.zeros(())  # seconds of a hand-over of nothing, and per byte
        self._links_version = -1

    def best(self, sources: Sequence[Candidate], targets: Sequence[Candidate], asked: Asked, now: float) -> Best:
        """At least the `NUM_RANKED` cheapest, in no order; with the same rule for equals as `PairCosts.all`.

        Args:
            sources, targets: prefill and decode workers that may be used; at least one target.
        """
        self._follow(sources, targets)
        config, split = self._config, self._split
        recent = np.exp(self._standings[6:] - now / WINDOW_S)  # utilization; arrivals per second
        busy = np.minimum(recent[0], MAX_UTILIZATION)
        mean_busy = float(busy[: split or None].mean())
        reading = self._reading(asked, busy, mean_busy, now)
        write_s = self._write_s(asked, recent[1, split:])
        source_s, local_s = reading.total_s[:split], reading.total_s[split:]
        self._favour(asked.last, source_s, local_s, write_s)

        rows = self._rows(sources, targets, asked, reading)
        num_rows = len(rows.sources)
        costs_s = np.empty((num_rows + 1, len(targets)))  # of pairs; in the last row targets that read the prompt, too
        pairs_s = self._left_s(rows, reading.missing[split:], costs_s[:num_rows])
        pairs_s *= config.transfer
        pairs_s += rows.total_s[:, None]
        pairs_s += write_s
        stall_s = config.itl * self._standings[3, split:] * reading.prefill_s[split:]
        costs_s[num_rows] = local_s + write_s + stall_s
        num_weighed = self._forbid(costs_s, rows.sources, reading.missing[split:])
        turns = self._standings[5]
        found = _least(costs_s, np.concatenate((turns[rows.sources], turns[split:])), NUM_RANKED)
        pairs = [
            Pairing(sources[rows.sources[at]], targets[to], at >= split)
            if at < num_rows
            else Pairing(None, targets[to], False)
            for at, to in found
        ]
        return Best(pairs, mean_busy, num_weighed)

    # the terms

    def _reading(self, asked: Asked, busy: Floats, mean_busy: float, now: float) -> _Reading:
        config, num_tokens = self._config, asked.num_tokens
        step_s, token_s, pair_s, *_ = self._speeds
        behind_s, read_at, half_mean_s, *_ = self._standings
        page_size, held_by = self._infos[1], asked.held.get
        held = np.array([held_by(key, 0) for key in self._keys], np.float64)
        missing = num_tokens - np.minimum(held, (num_tokens - 1) // page_size * page_size)  # see `readable`
        chunks = np.ceil(missing / self._infos[0])
        # a b + b (b + 1) / 2 pairs, where a + b are all tokens
        prefill_s = missing * (token_s + pair_s * (num_tokens + 0.5 - 0.5 * missing)) + step_s * chunks
        prefill_s *= config.prefill
        queue_s = np.maximum(read_at - now, behind_s)
        total_s = config.queue * queue_s
        total_s += (1 + config.followers * num_followers(mean_busy)) * prefill_s
        total_s += config.crowding * (busy / (1 - busy) * half_mean_s)
        return _Reading(queue_s, missing, chunks, prefill_s, total_s)

    def _rows(
        self, sources: Sequence[Candidate], targets: Sequence[Candidate], asked: Asked, reading: _Reading
    ) -> _Rows:
        config, split = self._config, self._split
        donors = rank_donors([*sources, *targets, *asked.leaving], asked.told)
        held = (asked.num_tokens - reading.missing[:split]).astype(np.int64).tolist()
        found = [
            (at, *donor)
            for at, source in enumerate(sources)
            if (donor := find_donor(source, held[at], asked.num_tokens, donors))
        ]
        own = _Rows(np.arange(split), reading.chunks[:split], reading.prefill_s[:split], reading.total_s[:split])
        if not found:
            return own
        at = np.array([at for at, _, _ in found])
        fetched = np.array([tokens for _, _, tokens in found], np.float64)
        links = [self._transfers.link(donor.key, sources[to].key) for to, donor, _ in found]
        fixed_s, byte_s = np.array(links).T
        chunk_tokens, page_size, block_bytes = self._infos[:, at]
        step_s, token_s, pair_s = self._speeds[:3, at]
        moving_s = fixed_s + byte_s * (fetched / page_size * block_bytes)
        missing = reading.missing[at] - fetched
        chunks = np.ceil(missing / chunk_tokens)
        prefill_s = missing * (token_s + pair_s * (asked.num_tokens + 0.5 - 0.5 * missing)) + step_s * chunks
        prefill_s *= config.prefill
        fetch_s = config.transfer * np.maximum(moving_s - reading.queue_s[at], 0.0)
        total_s = own.total_s[at] - own.prefill_s[at] + prefill_s + fetch_s
        fetching = _Rows(at, chunks, prefill_s, total_s)
        return _Rows(*(np.concatenate(parts) for parts in zip(own, fetching, strict=True)))

    def _write_s(self, asked: Asked, arrivals_per_s: Floats) -> Floats:
        decode_step_s, decode_row_s, decode_token_s = self._speeds[3:, self._split :]
        rows, kv_tokens = self._standings[3:5, self._split :]
        row_s = decode_row_s + decode_token_s * asked.num_tokens
        crowd = np.maximum(rows, arrivals_per_s * asked.output_tokens * (decode_step_s + row_s))
        weight = self._config.itl * asked.output_tokens
        return weight * (crowd * (decode_row_s + row_s) + decode_token_s * kv_tokens)  # type: ignore[no-any-return]

    def _favour(self, last: Pair | None, source_s: Floats, local_s: Floats, write_s: Floats) -> None:
        """Make the session's last workers cheaper."""
        if last is None:
            return
        half_s = self._config.affinity_s / 2
        source, target = self._positions.get(last[0], -1), self._positions.get(last[1], -1)
        if 0 <= source < self._split:
            source_s[source] -= half_s
        if target >= self._split:
            local_s[target - self._split] -= half_s
            write_s[target - self._split] -= half_s

    def _left_s(self, rows: _Rows, missing: Floats, out: Floats) -> Floats:
        """`[num_rows, num_targets]`: what of each hand-over is left when prefill ends. `missing`: by target."""
        _, page_size, block_bytes = self._infos[:, self._split :]
        inverse = 1 / rows.chunks[:, None]
        fixed_s, byte_s = self._links
        if fixed_s.ndim and len(rows.sources) > self._split:
            fixed_s, byte_s = fixed_s[rows.sources], byte_s[rows.sources]
        moving_s = byte_s * (np.ceil(missing / page_size) * block_bytes)
        late_s = moving_s - rows.prefill_s[:, None] * (1 - inverse)
        np.maximum(moving_s * inverse, late_s, out=out)
        out += fixed_s
        return out

    def _forbid(self, costs_s: Floats, sources: npt.NDArray[np.int64], missing: Floats) -> int:
        """Make infinite what may not be chosen; returns how many may. `sources`: of each row but the last."""
        num_weighed = costs_s.size
        if self._strangers is not None:
            strangers = self._strangers[sources]
            costs_s[:-1][strangers] = np.inf
            num_weighed -= int(np.count_nonzero(strangers))
        limit = self._config.local_prefill_tokens
        if limit >= 0 and num_weighed > len(missing):  # there is a pair
            too_long = missing > limit
            costs_s[-1][too_long] = np.inf
            num_weighed -= int(np.count_nonzero(too_long))
        return num_weighed

    # the workers

    def _follow(self, sources: Sequence[Candidate], targets: Sequence[Candidate]) -> None:
        """Bring the columns up to date."""
        workers = [*sources, *targets]
        if workers != self._workers or len(sources) != self._split:
            self._workers, self._split = workers, len(sources)
            self._keys = [worker.key for worker in workers]
            self._positions = {key: at for at, key in enumerate(self._keys)}
            self._known_infos, self._known_standings, self._known_speeds = [], [], []
            self._infos, self._standings, self._speeds = (np.zeros((rows, len(workers))) for rows in (3, 8, 6))
            self._links_version = -1
        infos = [worker.info for worker in workers]
        if _changed(infos, self._known_infos):
            self._known_infos = infos
            self._infos[:] = np.array([(one.chunk_tokens or _WHOLE, one.page_size, one.block_bytes) for one in infos]).T
            self._strangers = _strangers(infos[: self._split], infos[self._split :])
        standings = [worker.latest or worker.standing() for worker in workers]
        if changed := _changed(standings, self._known_standings):
            self._known_standings = standings
            self._standings[:, changed] = np.array([_column(standings[at]) for at in changed]).T
        speeds = [worker.steps.coefficients for worker in workers]
        if changed := _changed(speeds, self._known_speeds):
            self._known_speeds = speeds
            self._speeds[:, changed] = np.array([speeds[at] for at in changed]).T
        if self._links_version != self._transfers.version:
            self._links_version = self._transfers.version
            self._links = self._transfers.links(self._keys[: self._split], self._keys[self._split :])


def _changed(new: list[Any], known: list[Any]) -> list[int]:
    """Where the objects are others; everywhere if none were known."""
    if not known:
        return list(range(len(new)))
    if all(map(operator.is_, new, known)):
        return []
    return [at for at, (one, other) in enumerate(zip(new, known, strict=True)) if one is not other]


def _column(standing: Standing) -> tuple[float, ...]:
    """What is compared of a worker: in each row a number that stays what it is while time goes by.

    Prompts behind the one that is being read; when all of them will have been read; half of a mean prompt's time; rows;
    KV tokens; turn; logarithms of utilization and arrivals per second, as if they had not begun to decay.
    """
    return (
        max(standing.placed_s - standing.head_s, 0.0),
        max(standing.placed_s + standing.head_since, standing.told_s + standing.told_at),
        0.5 * standing.mean_prefill_s,
        standing.rows,
        standing.kv_tokens,
        standing.turn,
        _log_rate(standing.busy_s) + standing.busy_at / WINDOW_S,
        _log_rate(standing.arrivals) + standing.arrived_at / WINDOW_S,
    )


def _log_rate(total: float) -> float:
    """Of a decaying sum; exp(minus infinity) is 0."""
    return math.log(total / WINDOW_S) if total else -math.inf


def _strangers(sources: Sequence[WorkerInfo], targets: Sequence[WorkerInfo]) -> Mask | None:
    """Workers of unequal fingerprints never exchange KV."""
    unequal = np.array([one.fingerprint for one in sources])[:, None] != np.array([one.fingerprint for one in targets])
    return unequal if unequal.any() else None


def _least(costs_s: Floats, turns: Floats, count: int) -> list[tuple[int, int]]:
    """Rows and columns of the `count` least costs, of equals those with the earliest turns; infinite ones left out.

    Args:
        turns: of the sources of all rows but the last, then of targets.
    """
    flat, width = costs_s.reshape(-1), costs_s.shape[1]
    count = min(count, len(flat))
    limit_s = np.partition(flat, count - 1)[count - 1] + SAME_S
    close = np.flatnonzero(flat <= min(limit_s, sys.float_info.max))
    sources, targets = np.divmod(close, width)
    split = len(costs_s) - 1
    if len(close) > count:
        both = turns[np.where(sources < split, sources, split + targets)] + turns[split + targets]
        order = np.lexsort((both, np.rint(flat[close] / SAME_S)))[:count]
        sources, targets = sources[order], targets[order]
    return list(zip(sources.tolist(), targets.tolist(), strict=True))
