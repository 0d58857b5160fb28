"""PromQL over the catalogue. Functions take catalogue names, so that a misspelt one fails when files are generated.

Every gateway repeats what workers and the fleet told it: over such metrics the outermost aggregation
is a `max` by worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.metric_catalogue import BY_NAME, Kind, MetricSpec, Source


@dataclass(frozen=True, slots=True)
class Scope:
    """Where an expression is used.

    Attributes:
        selector: matchers that every series gets.
        window: range of rates.
        keep: labels kept beside the ones asked for: `job` in rules, so that several Batons stay apart.
    """

    selector: str
    window: str
    keep: tuple[str, ...]

    def wide(self, window: str) -> Scope:
        """The same over another range."""
        return Scope(self.selector, window, self.keep)


BOARD = Scope('job=~"$job"', "$__rate_interval", ())
RULE = Scope("", "5m", ("job",))


def gauge(scope: Scope, name: str, by: Sequence[str], *matchers: str) -> str:
    """A gauge: over workers, links or the fleet its `max`, over gateways its `sum`."""
    spec = _spec(name, Kind.GAUGE)
    return f"{_operator(spec.source)}{_by(scope, by)}({_series(scope, spec.series, matchers)})"


def rate(scope: Scope, name: str, by: Sequence[str], *matchers: str) -> str:
    """Growth of a counter, per second."""
    spec = _spec(name, Kind.COUNTER)
    series = _series(scope, spec.series, matchers)
    return f"{_operator(spec.source)}{_by(scope, by)}(rate({series}[{scope.window}]))"


def increase(scope: Scope, name: str, by: Sequence[str], *matchers: str) -> str:
    """Growth of a counter over the window."""
    spec = _spec(name, Kind.COUNTER)
    series = _series(scope, spec.series, matchers)
    return f"{_operator(spec.source)}{_by(scope, by)}(increase({series}[{scope.window}]))"


def pool_gauge(scope: Scope, name: str, by: Sequence[str], *matchers: str) -> str:
    """A worker gauge added up over workers."""
    return f"sum{_by(scope, by)}({gauge(scope, name, BY_NAME[name].labels, *matchers)})"


def pool_rate(scope: Scope, name: str, by: Sequence[str], *matchers: str) -> str:
    """A worker counter's rate added up over workers or links."""
    return f"sum{_by(scope, by)}({rate(scope, name, BY_NAME[name].labels, *matchers)})"


def quantile(scope: Scope, share: float, name: str, by: Sequence[str], *matchers: str) -> str:
    """Of a histogram."""
    spec = _spec(name, Kind.HISTOGRAM)
    series = _series(scope, f"{spec.name}_bucket", matchers)
    operator = _operator(spec.source)
    return f"histogram_quantile({share:g}, {operator}{_by(scope, ('le', *by))}(rate({series}[{scope.window}])))"


def mean(scope: Scope, name: str, by: Sequence[str], *matchers: str) -> str:
    """Mean of a histogram's values."""
    spec = _spec(name, Kind.HISTOGRAM)
    total, count = (_series(scope, f"{spec.name}_{part}", matchers) for part in ("sum", "count"))
    operator, labels = _operator(spec.source), _by(scope, by)
    return ratio(
        f"{operator}{labels}(rate({total}[{scope.window}]))", f"{operator}{labels}(rate({count}[{scope.window}]))"
    )


def ratio(part: str, whole: str) -> str:
    """`part / whole`; 0 where there is nothing."""
    return f"({part}) / (({whole}) > 0) or 0 * ({whole})"


def attainment(scope: Scope) -> str:
    """Share of the choices that ended well or by error which met the objectives; 1 where none ended."""
    ended = rate(scope, "baton_choices", (), 'finish_reason!="cancelled"')
    within = rate(scope, "baton_choices_within_slo", ())
    return f"({within}) / (({ended}) > 0) or 1 + 0 * ({ended})"


def error_ratio(scope: Scope) -> str:
    """Share of the choices that ended by an error."""
    failed = rate(scope, "baton_choices", (), 'finish_reason="error"')
    return ratio(failed, rate(scope, "baton_choices", ()))


def padding(scope: Scope, used: str, padded: str) -> str:
    """Share of a worker's step rows that were padding."""
    labels = BY_NAME[used].labels
    pad = rate(scope, padded, labels)
    return ratio(pad, f"{rate(scope, used, labels)} + {pad}")


def _spec(name: str, kind: Kind) -> MetricSpec:
    spec = BY_NAME[name]
    if spec.kind is not kind:
        raise ValueError(f"{name} is a {spec.kind}, not a {kind}")
    return spec


def _operator(source: Source) -> str:
    return "sum" if source is Source.GATEWAY else "max"


def _by(scope: Scope, labels: Sequence[str]) -> str:
    names = ", ".join((*scope.keep, *labels))
    return f" by ({names}) " if names else " "


def _series(scope: Scope, series: str, matchers: Sequence[str]) -> str:
    inside = ", ".join(part for part in (scope.selector, *matchers) if part)
    return f"{series}{{{inside}}}" if inside else series
