"""How long steps and transfers take, learned while serving: linear models, refitted with each batch of samples.

Weighted least squares with exponential forgetting, drawn towards a prior while samples are few (ridge regression, Hoerl
and Kennard 1970), coefficients never negative. Errors count relative to the time measured: a short step matters as much
as a long one, and a hiccup next to nothing. What has not been measured for a while fades into what others of its kind
are known for: a worker or link that looked slow once would otherwise never be tried again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine_core.messages import StepSums

Floats = npt.NDArray[np.float64]

FORGET = 0.995  # weight that a sample keeps when the next one comes
TRUSTED_SAMPLES = 20
FORGOTTEN = 1e-3  # freshness below which nobody knows better than anybody else
FADE_S = 10.0  # after which a third of an unconfirmed belief is left
_FLOOR_S = 0.001  # errors of times below it are not relative any more
_PRIOR_WEIGHT = 1e-3
_LEAST_WEIGHT = 1e-6  # of a prior, in 1 / s^2: as that of a sample that took so long, of the typical size


class LinearModel:
    """seconds = coefficients . features, all of them >= 0.

    Args:
        prior: coefficients to begin with.
        scale: a typical size of each feature.
        least: how much the prior of each feature counts at least, in 1 / s^2, as a sample of that size would.

    Attributes:
        coefficients: as fitted last.
        num_samples: seen.
    """

    def __init__(
        self, prior: Sequence[float], scale: Sequence[float], least: float | Sequence[float] = _LEAST_WEIGHT
    ) -> None:
        self.coefficients: tuple[float, ...] = tuple(prior)
        self.num_samples = 0
        self._scale = np.array(scale)
        self._least = np.array(least)
        self._prior = np.array(prior) * self._scale
        self._gram = np.zeros((len(prior), len(prior)))
        self._moment = np.zeros(len(prior))

    @property
    def is_trusted(self) -> bool:
        """Whether it has seen enough to judge samples by."""
        return self.num_samples >= TRUSTED_SAMPLES

    def learn(self, features: npt.ArrayLike, seconds: npt.ArrayLike) -> None:
        """Take samples `[n, num_features]` and their times `[n]`, oldest first."""
        rows = np.asarray(features, np.float64) / self._scale
        times = np.asarray(seconds, np.float64)
        count = len(times)
        weights = FORGET ** np.arange(count - 1, -1, -1) / np.square(np.maximum(times, _FLOOR_S))
        kept = FORGET**count
        self._gram = kept * self._gram + (rows * weights[:, None]).T @ rows
        self._moment = kept * self._moment + rows.T @ (weights * times)
        self.num_samples += count
        self._fit()

    def _fit(self) -> None:
        """The prior pulls on each feature as a small part of its own samples does; one never seen keeps its prior."""
        pull = _PRIOR_WEIGHT * self._gram.diagonal() + self._least
        gram = self._gram + np.diag(pull)
        solution = _non_negative(gram, self._moment + pull * self._prior)
        self.coefficients = tuple((solution / self._scale).tolist())


def _non_negative(gram: Floats, moment: Floats) -> Floats:
    """Solve `gram x = moment`, dropping whatever comes out negative and solving again for the rest."""
    solution = np.zeros(len(moment))
    active = np.arange(len(moment))
    while len(active):
        part = np.linalg.solve(gram[np.ix_(active, active)], moment[active])
        if (part >= 0).all():
            solution[active] = part
            break
        active = active[part >= 0]
    return solution


# Seconds on a small accelerator; only their proportions matter, until a fleet's first samples come.
_STEP_PRIOR = (2e-3, 3e-5, 2e-9, 5e-3, 5e-5, 5e-8)
_STEP_SCALE = (1.0, 1e3, 1e6, 1.0, 1e1, 1e4)
_TRANSFER_PRIOR = (1e-3, 1e-9)
_TRANSFER_SCALE = (1.0, 1e7)
# Most samples are the ends of prompts, small and of like sizes, and some waited for a busy host. What they tell of a
# byte's time is noise, which a large hand-over would have a hundred times over: until some have been large, it counts
# less than a single one that took ten times as long as foretold.
_TRANSFER_LEAST = (_LEAST_WEIGHT, (10 * _TRANSFER_PRIOR[1] * _TRANSFER_SCALE[1]) ** -2)


class StepModel:
    """Steps of one worker.

    Args:
        teacher: a worker of the same kind that knows better than nothing, or None.
    """

    def __init__(self, teacher: StepModel | None) -> None:
        self._model = LinearModel(teacher.coefficients if teacher else _STEP_PRIOR, _STEP_SCALE)
        self.coefficients: tuple[float, ...] = self._model.coefficients
        self._learned_at = -math.inf

    @property
    def fitted(self) -> tuple[float, ...]:
        """Coefficients as fitted last."""
        return self._model.coefficients

    @property
    def is_trusted(self) -> bool:
        """Whether it has seen enough."""
        return self._model.is_trusted

    def learn(self, samples: Sequence[StepSums], now: float) -> None:
        """Take what the worker measured."""
        rows = [
            (
                sample.prefill_steps,
                sample.prefill_tokens,
                sample.prefill_context,
                sample.decode_steps,
                sample.decode_rows,
                sample.decode_context,
            )
            for sample in samples
        ]
        self._model.learn(rows, [sample.seconds for sample in samples])
        self._learned_at = now
        self.coefficients = self._model.coefficients

    def freshness(self, now: float) -> float:
        """1 where it has just learned, 0 where it never has."""
        return math.exp((self._learned_at - now) / FADE_S)

    def fade(self, peers: Floats, now: float) -> None:
        """Believe what was fitted as far as it is fresh, else what peers `[num_features]` are known for."""
        kept = self.freshness(now)
        self.coefficients = tuple((kept * np.array(self._model.coefficients) + (1 - kept) * peers).tolist())

    def prefill_s(self, num_tokens: int, context: int, chunk_tokens: int) -> float:
        """Compute `num_tokens` of a prompt behind `context` tokens that are there already."""
        per_step, per_token, per_pair = self.coefficients[:3]
        pairs = num_tokens * context + num_tokens * (num_tokens + 1) / 2
        return per_step * num_chunks(num_tokens, chunk_tokens) + per_token * num_tokens + per_pair * pairs

    def decode_s(self, num_rows: float, kv_tokens: float) -> float:
        """One decode step of so many sequences with so many KV tokens together."""
        per_step, per_row, per_token = self.coefficients[3:]
        return per_step + per_row * num_rows + per_token * kv_tokens


def fade(models: Sequence[StepModel], now: float) -> None:
    """Workers of one role that have been idle come to be taken for what the busy ones are. Call it now and then."""
    weights = np.array([model.freshness(now) for model in models])
    if len(models) < 2 or weights.max() < FORGOTTEN:
        return
    fitted = np.array([model.fitted for model in models])
    peers = weights @ fitted / weights.sum()
    for model in models:
        model.fade(peers, now)


def num_chunks(num_tokens: int, chunk_tokens: int) -> int:
    """Prefill steps for so many tokens; `chunk_tokens` 0: always one."""
    return -(-num_tokens // chunk_tokens) if chunk_tokens else 1


class TransferModel:
    """Hand-overs between pairs of workers; a pair that was never measured is taken for an average one.

    The first hand-over of a pair connects it, too, and is not counted. All pairs are arrays, and fitted at once: what
    `LinearModel` does for a single one.

    Attributes:
        version: grows when anything that `links` returns may have changed.
    """

    def __init__(self) -> None:
        self.version = 0
        self._fleet = LinearModel(_TRANSFER_PRIOR, _TRANSFER_SCALE, _TRANSFER_LEAST)
        self._samples: list[tuple[Hashable, Hashable, int, float]] = []
        self._connected: set[tuple[Hashable, Hashable]] = set()
        self._rows: dict[Hashable, int] = {}
        self._free_rows: list[int] = []
        self._links = _Links(0)

    def learn(self, source: Hashable, target: Hashable, num_bytes: int, seconds: float) -> None:
        """What one hand-over took, from the end of prefill to the last byte's arrival; `fit` makes use of it."""
        if (source, target) in self._connected:
            self._samples.append((source, target, num_bytes, seconds))
        self._connected.add((source, target))

    def fit(self, now: float) -> None:
        """Call a few times a second."""
        samples, self._samples = self._samples, []
        if samples:
            sources, targets, num_bytes, seconds = zip(*samples, strict=True)  # there may be thousands
            row_of = {worker: self._row(worker) for worker in dict.fromkeys((*sources, *targets))}
            pairs = np.array([[row_of[key] for key in sources], [row_of[key] for key in targets]]).T
            features = np.stack((np.ones(len(samples)), np.array(num_bytes, np.float64)), axis=1)
            times = np.array(seconds)
            self._fleet.learn(features, times)
            self._links.learn(pairs, features, times, self._fleet.coefficients, now)
        self._links.fade(np.array(self._fleet.coefficients), now)
        self.version += 1

    def link(self, source: Hashable, target: Hashable) -> tuple[float, float]:
        """Seconds of a hand-over of nothing, and per byte."""
        row, column = self._rows.get(source), self._rows.get(target)
        if row is None or column is None:
            fixed_s, byte_s = self._fleet.coefficients
        else:
            fixed_s, byte_s = self._links.believed[row, column].tolist()
        return fixed_s, byte_s

    def table(self, workers: Sequence[Hashable]) -> LinkTable:
        """As `link`, of all pairs, as they are kept."""
        rows = [self._rows.get(worker, -1) for worker in workers]
        fixed_s, byte_s = self._fleet.coefficients
        return LinkTable(self._links.believed, rows, (fixed_s, byte_s))

    def links(self, sources: Sequence[Hashable], targets: Sequence[Hashable]) -> tuple[Floats, Floats]:
        """As `link`, of all pairs: each `[len(sources), len(targets)]`, or a scalar array where all are alike."""
        if not self._rows:
            fixed_s, byte_s = self._fleet.coefficients
            return np.array(fixed_s), np.array(byte_s)
        rows, columns = [self._row(key) for key in sources], [self._row(key) for key in targets]
        believed = self._links.believed[np.ix_(rows, columns)]
        return np.ascontiguousarray(believed[:, :, 0]), np.ascontiguousarray(believed[:, :, 1])

    def forget(self, worker: Hashable) -> None:
        """Drop the links of a worker."""
        self._samples = [sample for sample in self._samples if worker not in sample[:2]]
        self._connected = {pair for pair in self._connected if worker not in pair}
        row = self._rows.pop(worker, None)
        if row is not None:
            self._links.clear(row, self._fleet.coefficients)
            self._free_rows.append(row)
            self.version += 1

    def _row(self, worker: Hashable) -> int:
        row = self._rows.get(worker)
        if row is None:
            if not self._free_rows:
                size = len(self._links.believed)
                self._links = self._links.grown(2 * size + 8, self._fleet.coefficients)
                self._free_rows = list(range(2 * size + 7, size - 1, -1))
            row = self._rows[worker] = self._free_rows.pop()
        return row


class LinkTable(NamedTuple):
    """Links of some workers.

    Attributes:
        links: `[num_rows, num_rows, 2] f64`: seconds of a hand-over of nothing, and per byte.
        rows: of each worker; -1: it has none.
        others: what stands for a link where one of its workers has no row.
    """

    links: Floats
    rows: list[int]
    others: tuple[float, float]


class _Links:
    """Least squares for each pair of `size` rows, as in `LinearModel` for two features.

    Attributes:
        believed: `[size, size, 2]`: seconds of a hand-over of nothing, and per byte.
    """

    def __init__(self, size: int) -> None:
        self.believed = np.zeros((size, size, 2))
        self._fitted = np.zeros((size, size, 2))
        self._measured_at = np.full((size, size), -math.inf)
        self._gram = np.zeros((size, size, 3))  # sums of 1 1, 1 x and x x
        self._moment = np.zeros((size, size, 2))  # sums of 1 t and x t

    def grown(self, size: int, average: Sequence[float]) -> _Links:
        """The same with more rows, about which nothing is known."""
        grown, old = _Links(size), len(self.believed)
        grown.believed[:] = average
        grown.believed[:old, :old] = self.believed
        grown._fitted[:old, :old] = self._fitted
        grown._measured_at[:old, :old] = self._measured_at
        grown._gram[:old, :old] = self._gram
        grown._moment[:old, :old] = self._moment
        return grown

    def clear(self, row: int, average: Sequence[float]) -> None:
        """Know nothing about a worker."""
        for part in ((row, slice(None)), (slice(None), row)):
            self.believed[part] = average
            self._measured_at[part] = -math.inf
            self._gram[part] = self._moment[part] = 0.0

    def learn(
        self,
        pairs: npt.NDArray[np.int64],
        features: Floats,
        seconds: Floats,
        prior: Sequence[float],
        now: float,
    ) -> None:
        """Take samples, oldest first: `[n, 2]` rows, `[n, 2]` features, `[n]` times."""
        size, scale = len(self.believed), np.array(_TRANSFER_SCALE)
        flat, group, counts = np.unique(pairs @ (size, 1), return_inverse=True, return_counts=True)
        order = np.argsort(group, kind="stable")
        rank = np.empty(len(group), np.int64)
        rank[order] = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
        weights = FORGET ** (counts[group] - 1 - rank) / np.square(np.maximum(seconds, _FLOOR_S))
        ones, sizes = (features / scale).T

        def added(old: Floats, *products: Floats) -> Floats:
            sums = [np.bincount(group, weights * product, len(flat)) for product in products]
            kept: Floats = old[rows, columns] * (FORGET**counts)[:, None] + np.stack(sums, axis=1)
            return kept

        rows, columns = np.divmod(flat, size)
        self._gram[rows, columns] = gram = added(self._gram, ones, ones * sizes, sizes * sizes)
        self._moment[rows, columns] = moment = added(self._moment, seconds * ones, seconds * sizes)
        self._fitted[rows, columns] = _fit_two(gram, moment, np.array(prior) * scale) / scale
        self._measured_at[rows, columns] = now

    def fade(self, average: Floats, now: float) -> None:
        """Believe what was fitted as far as it is fresh, else the average."""
        kept = np.exp((self._measured_at - now) / FADE_S)[:, :, None]
        self.believed = kept * self._fitted + (1 - kept) * average


def _fit_two(gram: Floats, moment: Floats, prior: Floats) -> Floats:
    """What `LinearModel` makes of `[n, 3]` and `[n, 2]` sums, for each of n models of two features: `[n, 2]`."""
    diagonal = gram[:, [0, 2]]
    pull = _PRIOR_WEIGHT * diagonal + _TRANSFER_LEAST
    (a, c), b = (diagonal + pull).T, gram[:, 1]
    m, n = (moment + pull * prior).T
    determinant = a * c - b * b
    first, second = (m * c - n * b) / determinant, (n * a - m * b) / determinant
    alone_first, alone_second = np.maximum(m / a, 0.0), np.maximum(n / c, 0.0)
    both_negative = (first < 0) & (second < 0)
    fitted = np.stack(
        (
            np.where(first < 0, 0.0, np.where(second < 0, alone_first, first)),
            np.where(second < 0, 0.0, np.where(first < 0, alone_second, second)),
        ),
        axis=1,
    )
    fitted[both_negative] = 0.0
    return fitted


class Average:
    """A moving average that begins with a guess.

    Args:
        guess: worth `weight` samples.
        weight: how many samples it looks back, about.
    """

    __slots__ = ("_weight", "value")

    def __init__(self, guess: float, weight: int) -> None:
        self.value = guess
        self._weight = weight

    def add(self, value: float) -> None:
        """Take a sample."""
        self.value += (value - self.value) / self._weight
