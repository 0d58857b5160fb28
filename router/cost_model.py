"""How long steps and transfers take, learned while serving: linear models, refitted with each batch of samples.

Weighted least squares with exponential forgetting, drawn towards a prior while samples are few (ridge regression, Hoerl
and Kennard 1970), coefficients never negative. Errors count relative to the time measured: a short step matters as much
as a long one, and a hiccup next to nothing. What has not been measured for a while fades into what others of its kind
are known for: a worker or link that looked slow once would otherwise never be tried again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

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
_LEAST_WEIGHT = 1e-6


class LinearModel:
    """seconds = coefficients . features, all of them >= 0.

    Args:
        prior: coefficients to begin with.
        scale: a typical size of each feature.

    Attributes:
        coefficients: as fitted last.
        num_samples: seen.
    """

    def __init__(self, prior: Sequence[float], scale: Sequence[float]) -> None:
        self.coefficients: tuple[float, ...] = tuple(prior)
        self.num_samples = 0
        self._scale = np.array(scale)
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
        pull = _PRIOR_WEIGHT * self._gram.diagonal() + _LEAST_WEIGHT
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
        steps = -(-num_tokens // chunk_tokens) if chunk_tokens else 1
        pairs = num_tokens * context + num_tokens * (num_tokens + 1) / 2
        return per_step * steps + per_token * num_tokens + per_pair * pairs

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


class TransferModel:
    """Hand-overs between pairs of workers; a pair that was never measured is taken for an average one.

    The first hand-over of a pair connects it, too, and is not counted.
    """

    def __init__(self) -> None:
        self._fleet = LinearModel(_TRANSFER_PRIOR, _TRANSFER_SCALE)
        self._links: dict[tuple[Hashable, Hashable], LinearModel] = {}
        self._samples: dict[tuple[Hashable, Hashable], list[tuple[int, float]]] = {}
        self._connected: set[tuple[Hashable, Hashable]] = set()
        self._measured_at: dict[tuple[Hashable, Hashable], float] = {}
        self._rows: dict[Hashable, int] = {}
        self._free_rows: list[int] = []
        self._known = np.full((0, 0, 2), np.nan)  # [source, target, (fixed, per byte)]

    def learn(self, source: Hashable, target: Hashable, num_bytes: int, seconds: float) -> None:
        """What one hand-over took, from the end of prefill to the last byte's arrival; `fit` makes use of it."""
        if (source, target) in self._connected:
            self._samples.setdefault((source, target), []).append((num_bytes, seconds))
        self._connected.add((source, target))

    def fit(self, now: float) -> None:
        """Call a few times a second."""
        samples, self._samples = self._samples, {}
        for pair, of_link in samples.items():
            link = self._links.get(pair)
            if link is None:
                link = self._links[pair] = LinearModel(self._fleet.coefficients, _TRANSFER_SCALE)
            features, seconds = [(1.0, num_bytes) for num_bytes, _ in of_link], [took for _, took in of_link]
            for model in (self._fleet, link):
                model.learn(features, seconds)
            self._measured_at[pair] = now
        average = np.array(self._fleet.coefficients)
        for pair, link in self._links.items():
            kept = math.exp((self._measured_at[pair] - now) / FADE_S)
            if kept < FORGOTTEN:
                continue
            row, column = self._row(pair[0]), self._row(pair[1])  # which may replace the array
            self._known[row, column] = kept * np.array(link.coefficients) + (1 - kept) * average

    def link(self, source: Hashable, target: Hashable) -> tuple[float, float]:
        """Seconds of a hand-over of nothing, and per byte."""
        if (source, target) not in self._links:
            fixed_s, byte_s = self._fleet.coefficients
        else:
            fixed_s, byte_s = self._known[self._row(source), self._row(target)].tolist()
        return fixed_s, byte_s

    def links(self, sources: Sequence[Hashable], targets: Sequence[Hashable]) -> tuple[Floats, Floats]:
        """As `link`, of all pairs: each `[len(sources), len(targets)]`, or a scalar array where all are alike."""
        fixed_s, byte_s = self._fleet.coefficients
        if not self._links:
            return np.array(fixed_s), np.array(byte_s)
        rows, columns = [self._row(key) for key in sources], [self._row(key) for key in targets]
        known = self._known[np.ix_(rows, columns)]
        unknown = np.isnan(known[:, :, 0])
        return np.where(unknown, fixed_s, known[:, :, 0]), np.where(unknown, byte_s, known[:, :, 1])

    def forget(self, worker: Hashable) -> None:
        """Drop the links of a worker."""
        self._samples = {pair: samples for pair, samples in self._samples.items() if worker not in pair}
        self._connected = {pair for pair in self._connected if worker not in pair}
        row = self._rows.pop(worker, None)
        if row is not None:
            self._links = {pair: model for pair, model in self._links.items() if worker not in pair}
            self._measured_at = {pair: at for pair, at in self._measured_at.items() if worker not in pair}
            self._known[row, :] = self._known[:, row] = np.nan
            self._free_rows.append(row)

    def _row(self, worker: Hashable) -> int:
        row = self._rows.get(worker)
        if row is None:
            if not self._free_rows:
                size = len(self._known)
                grown = np.full((2 * size + 8, 2 * size + 8, 2), np.nan)
                grown[:size, :size] = self._known
                self._known = grown
                self._free_rows = list(range(len(grown) - 1, size - 1, -1))
            row = self._rows[worker] = self._free_rows.pop()
        return row


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
