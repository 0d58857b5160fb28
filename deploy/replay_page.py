"""The HTML page of `baton replay --plot`: self-contained, inline SVG, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

from router.simulator.experiment import Point, Results
from router.simulator.outcome import QUANTILES, Outcome

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 330, 62, 16, 14, 46
COLORS = ("#0b6bcb", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be185d", "#0f766e", "#57534e")

Series = Sequence[tuple[float, float]]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1917; --faint: #d6d3d1; --page: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e5e4; --faint: #44403c; --page: #1c1917; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 46rem; padding: 0 1rem; }
svg { width: 100%; height: auto; font-size: 12px; } svg text { fill: var(--ink); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
"""


def draw(results: Results, title: str) -> str:
    """The page."""
    last = results.points[-1]
    names = list(last.outcomes)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>baton replay: {html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(results.description)}; {html.escape(results.fleet)}.</p>",
        _legend(names),
    ]
    if len(results.points) > 1:
        curves = _by_load(results.points, lambda outcome: outcome.goodput_rps)
        parts += ["<h2>Goodput over offered load</h2>", _chart(curves, "load", "good requests/s", log_x=False)]
        curves = _by_load(results.points, lambda outcome: outcome.hit_ratio)
        curves["oracle"] = [(point.load, results.oracle_hit_ratio) for point in results.points]
        parts += ["<h2>Prefix hits over offered load</h2>", _chart(curves, "load", "share of tokens", log_x=False)]
    for point in results.points:
        heading = f"load {point.load:.2f}, {point.offered_rps:.2f} requests/s"
        cumulative = {
            name: [(max(ms, 1.0), rank / 100) for ms, rank in zip(outcome.ttft_quantiles_ms, QUANTILES, strict=True)]
            for name, outcome in point.outcomes.items()
        }
        parts += [f"<h2>{heading}</h2>", _table(point.outcomes)]
        parts += ["<h3>Time to first token</h3>", _chart(cumulative, "ms", "share of requests", log_x=True)]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _legend(names: Sequence[str]) -> str:
    items = [
        f'<span style="color:{COLORS[i % len(COLORS)]}">&#9632;</span> {html.escape(name)}'
        for i, name in enumerate(names)
    ]
    return "<p>" + " &nbsp; ".join(items) + "</p>"


def _by_load(points: Sequence[Point], value: Callable[[Outcome], float]) -> dict[str, Series]:
    return {name: [(point.load, value(point.outcomes[name])) for point in points] for name in points[0].outcomes}


def _table(outcomes: Mapping[str, Outcome]) -> str:
    head = "<tr><th>policy<th>goodput/s<th>TTFT p50<th>p99 ms<th>ITL p50<th>p99 ms<th>hits<th>refused</tr>"
    rows = [
        f"<tr><td>{html.escape(name)}<td>{o.goodput_rps:.2f}<td>{o.ttft_p50_ms:.0f}<td>{o.ttft_p99_ms:.0f}"
        f"<td>{o.itl_p50_ms:.1f}<td>{o.itl_p99_ms:.1f}<td>{o.hit_ratio:.1%}<td>{o.refused}</tr>"
        for name, o in outcomes.items()
    ]
    return f"<table>{head}{''.join(rows)}</table>"


def _chart(curves: Mapping[str, Series], x_label: str, y_label: str, *, log_x: bool) -> str:
    xs = [_warp(x, log_x) for curve in curves.values() for x, _ in curve]
    low, high = min(xs), max(xs)
    top = max(y for curve in curves.values() for _, y in curve) or 1.0
    span = high - low or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (_warp(x, log_x) - low) / span
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{y_label} over {x_label}">']
    for i in range(5):
        y = top * i / 4
        left, at = place(10**low if log_x else low, y)
        parts.append(f'<path d="M{left:.1f} {at:.1f}H{WIDTH - RIGHT}" stroke="var(--faint)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.3g}</text>')
        value = low + span * i / 4
        across, _ = place(10**value if log_x else value, 0.0)
        label = f"{10**value if log_x else value:.3g}"
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(x, y) for x, y in curve))
        dash = ' stroke-dasharray="5 4"' if name == "oracle" else ""
        color = "var(--ink)" if name == "oracle" else COLORS[i % len(COLORS)]
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"{dash}><title>{html.escape(name)}'
            "</title></polyline>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">{y_label}</text>'
    )
    return "\n".join([*parts, "</svg>"])


def _warp(x: float, log_x: bool) -> float:
    return math.log10(x) if log_x else x
