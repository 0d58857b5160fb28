"""Where each kernel's cycles go, as an SVG: one bar per kernel, the time that HBM needs marked on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any
from xml.sax.saxutils import escape

Result = Mapping[str, Any]
_PARTS = (("hot loop", "#4269d0"), ("other loops", "#efb118"), ("once per call", "#ff725c"), ("around it", "#9c9c9c"))
_BAR, _GAP, _LABEL, _WIDTH, _NOTE = 16, 6, 150, 520, 330
_UNITS = ("MATMUL", "MATPUSH", "VALU", "XLU", "EUP", "VLOAD", "VSTORE", "SALU")


def split_cycles(result: Result) -> dict[str, float]:
    """Cycles of a result by part: the main kernel's hot loop, its other loops, what it does once, other kernels."""
    main = max(result["kernels"], key=lambda kernel: float(kernel["total_cycles"]))
    spent = [loop["passes"] * loop["pass_cycles"] for loop in main["loops"]]
    hot = max(spent, default=0.0)
    around = sum(kernel["total_cycles"] for kernel in result["kernels"]) - main["total_cycles"]
    parts = (hot, sum(spent) - hot, main["once"]["cycles"], around)
    return {name: float(cycles) for (name, _), cycles in zip(_PARTS, parts, strict=True)}


def draw(results: Sequence[Result]) -> str:
    """The SVG. Results that are errors are left out."""
    good = sorted(
        (r for r in results if "error" not in r), key=lambda r: (r["generation"], r["shape"], r["compute_us"])
    )
    lines = list(_legend())
    y = 40
    for (generation, shape), group in groupby(good, key=lambda r: (r["generation"], r["shape"])):
        members = list(group)
        lines.append(_text(0, y + 12, f"{generation}   {shape}", bold=True))
        y += _BAR + _GAP
        longest = max(max(r["compute_us"], r["hbm_us"]) for r in members)
        for result in members:
            lines += _bar(result, y, _WIDTH / longest)
            y += _BAR + _GAP
        y += _GAP
    width = _LABEL + _WIDTH + _NOTE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{y}" fill="white"/>', *lines, "</svg>"]) + "\n"


def _legend() -> Iterable[str]:
    x = _LABEL
    for name, color in _PARTS:
        yield f'<rect x="{x}" y="10" width="12" height="12" fill="{color}"/>'
        yield _text(x + 16, 20, name)
        x += 110
    yield f'<rect x="{x}" y="8" width="2" height="16" fill="black"/>'
    yield _text(x + 8, 20, "time that HBM needs")


def _bar(result: Result, y: int, per_us: float) -> Iterable[str]:
    yield _text(0, y + 12, str(result["kernel"]))
    parts = split_cycles(result)
    scale = result["compute_us"] / sum(parts.values()) * per_us
    x = float(_LABEL)
    for name, color in _PARTS:
        width = parts[name] * scale
        yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{color}"/>'
        x += width
    at = _LABEL + result["hbm_us"] * per_us
    yield f'<rect x="{at:.1f}" y="{y - 2}" width="2" height="{_BAR + 4}" fill="black"/>'
    use = sorted(((result["hot_use"].get(unit, 0.0), unit) for unit in _UNITS), reverse=True)[:3]
    busy = ", ".join(f"{unit} {share:.0%}" for share, unit in use)
    yield _text(_LABEL + _WIDTH + 8, y + 12, f"{result['compute_us']:.0f} us: {busy}, {result['spills']} spills")


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="12"{weight}>{escape(text)}</text>'
