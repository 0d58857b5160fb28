"""Traces of a given shape: when requests come, how long they are, what they share.

Sessions begin as a Poisson process whose rate may swing in time or come in bursts. A session opens with one of some
system prompts, of Zipf-distributed popularity (or with none), and goes on for a geometric number of turns; each turn's
prompt is the one before it, the answer to it, and new text. Lengths are log-normal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine_core.errors import ConfigError
from router.simulator.trace import BLOCK_TOKENS, Floats, Trace, TracedRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Of a trace."""

    requests: int = 5000  # how many
    rate_rps: float = 4.0  # requests per second on average
    swing: float = 0.0  # the rate goes up and down by this share of its mean, 0 to 1
    period_s: float = 3600.0  # of the swing
    burstiness: float = 1.0  # squared coefficient of variation of the gaps between sessions; 1 is Poisson
    turns: float = 3.0  # of a session, on average
    think_s: float = 60.0  # between an answer and the next turn, on average (exponential)
    system_prompts: int = 20  # different ones
    system_tokens: int = 1024  # of each; 0: none
    zipf: float = 1.1  # the k-th most popular system prompt is used in proportion to k ** -zipf
    input_tokens: float = 2000.0  # new text of a turn, median
    input_sigma: float = 1.0  # standard deviation of its logarithm
    output_tokens: float = 300.0  # of an answer, median
    output_sigma: float = 0.7
    max_input_tokens: int = 131_072  # a session ends before a prompt longer than this
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ConfigError(f"{field.name} must be a number of at least 0, not {value!r}")
        for name, least in (("requests", 1), ("turns", 1), ("system_prompts", 1), ("block_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("rate_rps", "period_s", "burstiness", "input_tokens", "output_tokens"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive")
        if self.swing > 1:
            raise ConfigError(f"swing must be at most 1, not {self.swing}")
        if self.max_input_tokens <= self.system_tokens:
            raise ConfigError("max_input_tokens must be more than system_tokens")


def synthesize(shape: Shape, seed: int) -> Trace:
    """Draw a trace; the same for the same seed."""
    rng = np.random.default_rng(seed)
    ids = _Ids(shape)
    starts = _starts(shape, rng)
    requests: list[TracedRequest] = []
    while True:
        start = next(starts)
        if len(requests) >= shape.requests:
            requests.sort(key=lambda request: request.arrival_s)
            if requests[shape.requests - 1].arrival_s <= start:  # later sessions come behind all that are kept
                return Trace(tuple(requests[: shape.requests]), shape.block_tokens)
        requests += _session(shape, start, ids, rng)


class _Ids:
    """Names for blocks."""

    def __init__(self, shape: Shape) -> None:
        self.size = shape.block_tokens
        whole = shape.system_tokens // self.size
        self._systems = np.arange(shape.system_prompts * whole, dtype=np.int32).reshape(shape.system_prompts, whole)
        self._next = self._systems.size

    def system(self, number: int) -> list[int]:
        """Of the full blocks of a system prompt."""
        return [int(block) for block in self._systems[number]]

    def fresh(self, count: int) -> list[int]:
        """Never used before."""
        self._next += count
        return list(range(self._next - count, self._next))


def _starts(shape: Shape, rng: np.random.Generator) -> Iterator[float]:
    """Times of new sessions: a gamma renewal process whose clock runs as fast as the rate is high."""
    rate = shape.rate_rps / shape.turns
    clock = 0.0
    while True:
        clock += float(rng.gamma(1 / shape.burstiness, shape.burstiness)) / rate
        yield _unwarped(clock, shape)


def _unwarped(clock: float, shape: Shape) -> float:
    """When the integral of `1 - swing * cos(2 pi t / period)` reaches `clock`."""
    low, high = clock - shape.period_s, clock + shape.period_s
    for _ in range(50):
        middle = (low + high) / 2
        turned = 2 * math.pi * middle / shape.period_s
        if middle - shape.swing * shape.period_s / (2 * math.pi) * math.sin(turned) < clock:
            low = middle
        else:
            high = middle
    return max(high, 0.0)


def _session(shape: Shape, start: float, ids: _Ids, rng: np.random.Generator) -> list[TracedRequest]:
    weights = np.arange(1, shape.system_prompts + 1) ** -shape.zipf
    blocks = ids.system(int(rng.choice(shape.system_prompts, p=weights / weights.sum())))
    num_tokens = shape.system_tokens
    requests = []
    at = start
    for _ in range(int(rng.geometric(1 / shape.turns))):
        num_tokens += _length(shape.input_tokens, shape.input_sigma, rng)
        if num_tokens > shape.max_input_tokens:
            break
        num_output = _length(shape.output_tokens, shape.output_sigma, rng)
        blocks = blocks + ids.fresh(num_tokens // ids.size - len(blocks))
        rest = ids.fresh(1 if num_tokens % ids.size else 0)  # becomes another block when it is full
        requests.append(TracedRequest(at, num_tokens, num_output, np.array(blocks + rest, np.int32)))
        num_tokens += num_output
        at += float(rng.exponential(shape.think_s))
    return requests


def _length(median: float, sigma: float, rng: np.random.Generator) -> int:
    return max(1, round(median * math.exp(sigma * float(rng.standard_normal()))))


def warp(trace: Trace, swing: float, period_s: float) -> Trace:
    """The same requests in the same order, their rate swinging by a share of itself with a period."""
    shape = Shape(swing=swing, period_s=period_s)
    first = trace.requests[0].arrival_s
    times: Floats = np.array([_unwarped(request.arrival_s - first, shape) for request in trace.requests])
    return Trace(
        tuple(
            TracedRequest(float(at), request.input_tokens, request.output_tokens, request.blocks)
            for at, request in zip(np.maximum.accumulate(times), trace.requests, strict=True)
        ),
        trace.block_tokens,
    )
