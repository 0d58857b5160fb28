"""How many prefill and decode slices there should be, and why. Pure logic: observations and time in, a plan out.

Prefill follows predicted TTFT, decode predicted ITL and KV occupancy. A forecast of the load at the time when a slice
ordered now would serve sets the floor of each pool; what was measured moves a pool by one slice at a time, up when the
objective is missed though the floor says that it should not be, down only when one slice less still meets it, both in
the model and by measured use. Between two changes of a pool lies at least the time that a slice takes to start, except
that the floor may rise at any time. Where one pool lacks a slice that the other can spare, a role flip is proposed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from engine_core.errors import ConfigError
from engine_core.types import Role
from router.forecast import Forecast
from router.pool_model import DecodeCosts, DecodeState, decode_state, smoothed, spare_share, ttft_attainment

MAX_SERVICES = 2000  # recent prompts that the model looks at
_SMOOTHING = 0.1  # of means per request
_MISSES = 2  # windows in a row before feedback acts
_DEVIATIONS = 2.0  # of the number of rows
_UP, _DOWN = 0.5, 1.4  # of the forecast's error, for growing and for shrinking


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """What is wanted, and what is allowed.

    Attributes:
        ttft_s, itl_s: objectives.
        attainment: share of requests that shall meet each.
        window_s: length of an observation.
        start_s: from the order of a slice until it serves.
        cooldown_s: between two changes of a pool; at least `start_s`.
        flip_s: what a change of role takes; 0: flips are never proposed.
        cold_s: what a slice says in its first seconds is ignored.
        min_prefill, max_prefill, min_decode, max_decode: bounds.
        budget: slices in all.
        kv_share, slot_share, link_share: of decode memory, slots and network that may be in use.
        local_share: of the time that decode slices have to spare, how much counts for prefill; 0 where decode slices
            read no prompts.
    """

    ttft_s: float
    itl_s: float
    start_s: float
    cooldown_s: float
    max_prefill: int
    max_decode: int
    budget: int
    attainment: float = 0.95
    window_s: float = 15.0
    flip_s: float = 0.0
    cold_s: float = 30.0
    min_prefill: int = 1
    min_decode: int = 1
    kv_share: float = 0.85
    slot_share: float = 0.9
    link_share: float = 0.7
    local_share: float = 0.8

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s", "window_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("attainment", "kv_share", "slot_share", "link_share", "local_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in 0..1, not {getattr(self, name)}")
        if self.cooldown_s < self.start_s:
            raise ConfigError(f"cooldown_s must be at least start_s ({self.start_s:g}), not {self.cooldown_s:g}")
        if not 0 <= self.min_prefill <= self.max_prefill:
            raise ConfigError(f"min_prefill must be in 0..{self.max_prefill}, not {self.min_prefill}")
        if not 1 <= self.min_decode <= self.max_decode:
            raise ConfigError(f"min_decode must be in 1..{self.max_decode}, not {self.min_decode}")
        if self.min_prefill + self.min_decode > self.budget:
            raise ConfigError(f"budget must be at least min_prefill + min_decode, not {self.budget}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceSample:
    """One slice over one window.

    Attributes:
        age_s: since it began to serve.
        kv_share: of its KV memory in use by running sequences.
    """

    role: Role
    age_s: float
    kv_share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One window.

    Attributes:
        at: its end.
        requests: that arrived; where several gateways were read at different moments, scaled to the window.
        service_s: of those placed, the prefill seconds of what no cache held.
        output_tokens, context_tokens: per request that ended, on average (context: prompt and half the answer); 0 where
            none ended.
        ttft_met, itl_met: share of the requests that met each objective; None where there were none.
        slices: that serve and are not draining.
        starting: per role, ordered and not serving yet.
        transfer_s: per request, for how long its KV keeps a decode slice's network busy; 0 for those read there.
        decode: what decode steps take, as learned.
        available: the most slices of a role that can be had for now; a role that is not in it: as many as configured.
    """

    at: float
    requests: float
    service_s: Sequence[float]
    output_tokens: float
    context_tokens: float
    ttft_met: float | None
    itl_met: float | None
    slices: Sequence[SliceSample]
    starting: dict[Role, int]
    transfer_s: float
    decode: DecodeCosts
    available: dict[Role, int] = field(default_factory=dict)


class Cause(StrEnum):
    """Why a pool is to change."""

    FORECAST = "forecast"  # the load ahead needs more
    MISSED = "missed"  # an objective was missed, or memory runs out
    SPARE = "spare"  # one less would do
    BUDGET = "budget"  # no more slices are allowed in all
    UNAVAILABLE = "unavailable"  # no more can be had for now
    LIMITS = "limits"  # it was outside its bounds


@dataclass(frozen=True, slots=True)
class Plan:
    """What should be.

    Attributes:
        prefill, decode: slices wanted, with those that are starting.
        flips: (from, to) roles of slices that should change theirs; counted in `prefill` and `decode` already.
        reasons: one sentence per finding.
        causes: by role; of a pool that stays as it is there is none.
    """

    at: float
    prefill: int
    decode: int
    flips: tuple[tuple[Role, Role], ...]
    reasons: tuple[str, ...]
    causes: dict[Role, Cause]

    def wanted(self, role: Role) -> int:
        """Slices of a role."""
        return self.prefill if role is Role.PREFILL else self.decode

    def advise(self, prefill: int, decode: int) -> str:
        """For people: what to do where there are so many now, and why."""
        steps = [f"make a {source} slice a {target} slice" for source, target in self.flips]
        flipped = sum(1 if target is Role.PREFILL else -1 for _, target in self.flips)
        for role, have in ((Role.PREFILL, prefill + flipped), (Role.DECODE, decode - flipped)):
            want = self.wanted(role)
            if want != have:
                steps.append(f"{'start' if want > have else 'stop'} {abs(want - have)} {role}")
        head = f"{prefill}P{decode}D -> {self.prefill}P{self.decode}D: {', '.join(steps) or 'leave it'}"
        return "\n".join([head, *(f"  {reason}" for reason in self.reasons)])


@dataclass(slots=True)
class _Pool:
    """What the planner remembers of one role."""

    changed_at: float | None = None
    misses: int = 0
    cause: Cause = Cause.LIMITS
    reasons: list[str] = field(default_factory=list)


class Planner:
    """See the module."""

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        self._rate = Forecast(math.ceil(config.start_s / config.window_s) + 1)
        self._services: deque[float] = deque(maxlen=MAX_SERVICES)
        self._output_tokens = 0.0
        self._context = 0.0
        self._transfer_s = 0.0
        self._costs: DecodeCosts | None = None
        self._is_short_of_prefill = False
        self._pools = {Role.PREFILL: _Pool(), Role.DECODE: _Pool()}

    def plan(self, seen: Observation) -> Plan:
        """Take the next window, and say what should be."""
        self._learn(seen)
        for pool in self._pools.values():
            pool.reasons.clear()
            pool.cause = Cause.LIMITS
        have = {role: _count(seen, role) for role in Role}
        decode_floor = self._decode_floor(seen)
        prefill_floor = self._prefill_floor(max(decode_floor, have[Role.DECODE]), seen)
        self._is_short_of_prefill = prefill_floor > _serving(seen, Role.PREFILL)
        prefill = self._steer(Role.PREFILL, have[Role.PREFILL], prefill_floor, have[Role.DECODE], seen)
        decode = self._steer(Role.DECODE, have[Role.DECODE], decode_floor, prefill, seen)
        prefill, decode = self._within_budget(prefill, decode, have)
        flips = self._flips(have, prefill, decode)
        want = {Role.PREFILL: prefill, Role.DECODE: decode}
        for role, pool in self._pools.items():
            if want[role] != have[role]:
                pool.changed_at = seen.at
                pool.misses = 0
        reasons = (*self._pools[Role.PREFILL].reasons, *self._pools[Role.DECODE].reasons)
        causes = {role: pool.cause for role, pool in self._pools.items() if want[role] != have[role]}
        return Plan(seen.at, prefill, decode, flips, reasons, causes)

    def _learn(self, seen: Observation) -> None:
        self._rate.add(seen.requests / self._config.window_s)
        self._services.extend(seen.service_s)
        if seen.output_tokens:
            first = not self._output_tokens
            self._output_tokens = _smooth(self._output_tokens, seen.output_tokens, first)
            self._context = _smooth(self._context, seen.context_tokens, first)

        self._costs = smoothed(self._costs, seen.decode, _SMOOTHING)
        if seen.transfer_s:
            self._transfer_s = _smooth(self._transfer_s, seen.transfer_s, not self._transfer_s)

    # floors: what the forecast says

    def _prefill_floor(self, decode: int, seen: Observation) -> int:
        config, rate = self._config, self._rate.upper(_UP)
        for count in self._counts(Role.PREFILL, seen):
            if self._ttft_met(count, decode, rate) >= config.attainment:
                break
        mean_s = sum(self._services) / len(self._services) if self._services else 0.0
        self._say(
            Role.PREFILL,
            f"prefill: {rate:.2f} requests/s of {mean_s:.2f} s each are expected; {count} slices would answer "
            f"{self._ttft_met(count, decode, rate):.0%} of them within {config.ttft_s:g} s",
        )
        return count

    def _ttft_met(self, prefill: int, decode: int, rate: float) -> float:
        """Prefill slices, and what decode slices have to spare, as one pool."""
        config = self._config
        assert self._costs is not None
        spare = spare_share(self._costs, rate, self._output_tokens, self._context, decode, config.itl_s)
        servers = prefill + config.local_share * spare * decode
        return ttft_attainment(self._services, rate, servers, config.ttft_s)

    def _decode_floor(self, seen: Observation) -> int:
        rate = self._rate.upper(_UP)
        for count in self._counts(Role.DECODE, seen):
            state = self._decode_state(count, rate)
            if self._is_enough(state, rate, count):
                break
        self._say(
            Role.DECODE,
            f"decode: {rate:.2f} requests/s of {self._output_tokens:.0f} tokens behind {self._context:.0f} are "
            f"expected; {count} slices would have up to {state.peak_rows:.0f} rows each, {1e3 * state.itl_s:.1f} ms "
            f"between tokens, {state.kv_share:.0%} of the KV memory and {rate * self._transfer_s / count:.0%} of the "
            f"network in use",
        )
        return count

    def _decode_state(self, slices: int, rate: float) -> DecodeState:
        assert self._costs is not None
        return decode_state(self._costs, rate, self._output_tokens, self._context, slices, _DEVIATIONS)

    def _is_enough(self, state: DecodeState, rate: float, slices: int) -> bool:
        config = self._config
        return (
            state.itl_s <= config.itl_s
            and state.kv_share <= config.kv_share
            and state.slot_share <= config.slot_share
            and rate * self._transfer_s / slices <= config.link_share
        )

    # feedback: what was measured

    def _steer(self, role: Role, have: int, floor: int, others: int, seen: Observation) -> int:
        """How many there shall be of a role, where there are to be so many `others` of the other one."""
        config, pool = self._config, self._pools[role]
        lowest, highest = self._bounds(role, seen)
        missed = self._has_missed(role, seen)
        pool.misses = pool.misses + 1 if missed else 0
        if pool.changed_at is None:  # a forecast needs some windows, too
            pool.changed_at = seen.at
        is_cool = seen.at - pool.changed_at >= config.cooldown_s
        if have > highest and role in seen.available:
            self._say(role, f"{role}: no more than {highest} can be had for now", Cause.UNAVAILABLE)
            return highest
        if floor > have:
            self._say(role, f"{role}: the floor is {floor}, there are {have}", Cause.FORECAST)
            return min(max(floor, lowest), highest)
        if pool.misses >= _MISSES and is_cool and not seen.starting.get(role, 0):
            self._say(role, f"{role}: {missed} in {pool.misses} windows in a row; one more", Cause.MISSED)
            return min(max(have + 1, lowest), highest)
        if floor < have and is_cool and not missed and self._can_spare(role, have, others, seen):
            self._say(role, f"{role}: {have - 1} slices would do; one less", Cause.SPARE)
            return min(max(have - 1, lowest), highest)
        return min(max(have, lowest), highest)

    def _has_missed(self, role: Role, seen: Observation) -> str:
        """What objective a pool misses, in words; empty where it meets it."""
        config = self._config
        if role is Role.PREFILL:
            met = seen.ttft_met
            return (
                f"only {met:.0%} had their first token in time" if met is not None and met < config.attainment else ""
            )
        met = seen.itl_met
        if met is not None and met < config.attainment and not self._is_short_of_prefill:
            return f"only {met:.0%} had their tokens in time"  # else prompts read there may hold the steps up
        warm = self._warm(role, seen)
        share = max((sample.kv_share for sample in warm), default=0.0)
        return f"a slice uses {share:.0%} of its KV memory" if share > config.kv_share else ""

    def _can_spare(self, role: Role, have: int, others: int, seen: Observation) -> bool:
        """Whether one slice less would do even if the forecast is well off; of what was measured, warm slices count.

        One decode slice less must not make another prefill slice needed, either.
        """
        config = self._config
        rate = self._rate.upper(_DOWN)
        if seen.starting.get(role, 0) or have <= 1 or not self._rate.is_proven:
            return False
        prefill, decode = (have - 1, others) if role is Role.PREFILL else (others, have - 1)
        reads = role is Role.PREFILL or config.local_share > 0
        if reads and self._ttft_met(prefill, decode, rate) < config.attainment:
            return False
        if role is Role.PREFILL:
            return True
        used = sum(sample.kv_share for sample in self._warm(role, seen)) / (have - 1)
        is_enough = self._is_enough(self._decode_state(have - 1, rate), rate, have - 1)
        return is_enough and used <= config.kv_share

    def _warm(self, role: Role, seen: Observation) -> list[SliceSample]:
        return [one for one in seen.slices if one.role is role and one.age_s >= self._config.cold_s]

    # limits

    def _counts(self, role: Role, seen: Observation) -> range:
        """What a pool may be; never empty."""
        lowest, highest = self._bounds(role, seen)
        return range(min(lowest, highest), highest + 1)

    def _bounds(self, role: Role, seen: Observation) -> tuple[int, int]:
        """Least and most; the most may be below the least where no more can be had."""
        config = self._config
        if role is Role.PREFILL:
            return config.min_prefill, min(config.max_prefill, seen.available.get(role, config.max_prefill))
        return config.min_decode, min(config.max_decode, seen.available.get(role, config.max_decode))

    def _within_budget(self, prefill: int, decode: int, have: dict[Role, int]) -> tuple[int, int]:
        """Take from the pool that is larger by its own measure; never below the minimum."""
        config = self._config
        if prefill + decode <= config.budget:
            return prefill, decode
        total = prefill + decode
        share = round(config.budget * prefill / total)
        kept = min(max(share, config.min_prefill), config.budget - config.min_decode)
        self._say(
            Role.PREFILL,
            f"the budget of {config.budget} slices allows {kept}P{config.budget - kept}D of {prefill}P{decode}D",
        )
        for role, count in ((Role.PREFILL, kept), (Role.DECODE, config.budget - kept)):
            if count < have[role]:
                self._pools[role].cause = Cause.BUDGET
        return kept, config.budget - kept

    def _flips(self, have: dict[Role, int], prefill: int, decode: int) -> tuple[tuple[Role, Role], ...]:
        """One pool grows, the other shrinks: a slice of the one becomes one of the other, which is quicker."""
        config = self._config
        if not 0 < config.flip_s < config.start_s:
            return ()
        grows, shrinks = prefill - have[Role.PREFILL], decode - have[Role.DECODE]
        source, target = (Role.DECODE, Role.PREFILL) if grows > 0 else (Role.PREFILL, Role.DECODE)
        count = min(abs(grows), abs(shrinks)) if grows * shrinks < 0 else 0
        return ((source, target),) * count

    def _say(self, role: Role, reason: str, cause: Cause | None = None) -> None:
        self._pools[role].reasons.append(reason)
        if cause is not None:
            self._pools[role].cause = cause


def _serving(seen: Observation, role: Role) -> int:
    return sum(sample.role is role for sample in seen.slices)


def _count(seen: Observation, role: Role) -> int:
    return _serving(seen, role) + seen.starting.get(role, 0)


def _smooth(old: float, new: float, first: bool) -> float:
    return new if first else old + _SMOOTHING * (new - old)
