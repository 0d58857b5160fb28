"""Panels that several boards use."""

from __future__ import annotations

from deploy.monitoring.panels import Panel, Query, Shape
from deploy.monitoring.promql import BOARD, padding, quantile, rate, ratio
from router.metric_catalogue import BY_NAME

WORKER = ("worker",)
LINK = ("prefill", "decode")
PREFILL, DECODE = 'role="prefill"', 'role="decode"'


def lines(title: str, text: str, unit: str, width: int, *queries: tuple[str, str]) -> Panel:
    """Lines over time; `queries` are (expression, legend)."""
    return Panel(title, text, Shape.LINES, unit, width, tuple(Query(*query) for query in queries))


def number(
    title: str, text: str, unit: str, width: int, expr: str, warn: float | None = None, bad: float | None = None
) -> Panel:
    """One big number."""
    return Panel(title, text, Shape.NUMBER, unit, width, (Query(expr, title),), warn=warn, bad=bad)


def matrix(title: str, text: str, unit: str, expr: str) -> Panel:
    """A heat map, prefill workers by decode workers."""
    return Panel(title, text, Shape.MATRIX, unit, 12, (Query(expr, ""),), rows="prefill", columns="decode")


def quantiles(title: str, text: str, name: str, width: int) -> Panel:
    """p50, p90 and p99 of a gateway histogram."""
    shares = ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
    return lines(title, text, "s", width, *((quantile(BOARD, share, name, ()), label) for share, label in shares))


def stage(title: str, text: str, name: str, role: str, width: int) -> Panel:
    """p50 and p99 of a worker histogram, by worker."""
    return lines(
        title,
        text,
        "s",
        width,
        (quantile(BOARD, 0.5, name, WORKER, role), "{{worker}} p50"),
        (quantile(BOARD, 0.99, name, WORKER, role), "{{worker}} p99"),
    )


def heat(title: str, text: str, name: str, width: int) -> Panel:
    """All buckets of a gateway histogram over time."""
    expr = f'sum by (le) (increase({BY_NAME[name].name}_bucket{{job=~"$job"}}[$__rate_interval]))'
    return Panel(title, text, Shape.HEATMAP, "s", width, (Query(expr, "{{le}}"),))


def padding_share(role: str) -> str:
    """Share of step rows that only padded, by worker of a role."""
    used, padded = {
        PREFILL: ("baton_prefill_step_tokens", "baton_prefill_padding_tokens"),
        DECODE: ("baton_decode_step_rows", "baton_decode_padding_rows"),
    }[role]
    return padding(BOARD, used, padded)


def hit_share(role: str) -> str:
    """Share of the tokens looked up that were found, by worker of a role."""
    hit = rate(BOARD, "baton_prefix_hit_tokens", WORKER, role)
    return ratio(hit, rate(BOARD, "baton_prefix_query_tokens", WORKER, role))
