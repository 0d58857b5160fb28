"""Draws the loss curve: ``python -m examples.demo_model.plot loss_curve.csv loss_curve.svg``; needs no plot library."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 720, 400, 52  # pixels
LINES = {
    "train_loss": ("training mixture", "#888888"),
    "held_out_prose": ("held-out documentation", "#1f77b4"),
    "held_out_code": ("held-out code", "#2ca02c"),
    "held_out_dialogue": ("held-out dialogues", "#d62728"),
}


def draw(rows: list[dict[str, float]]) -> str:
    """An SVG of nats per token over millions of tokens seen."""
    last_x = max(row["tokens"] for row in rows) / 1e6
    top = max(row[name] for row in rows for name in LINES)

    def place(tokens: float, loss: float) -> str:
        x = MARGIN + tokens / 1e6 / last_x * (WIDTH - 2 * MARGIN)
        return f"{x:.1f},{HEIGHT - MARGIN - loss / top * (HEIGHT - 2 * MARGIN):.1f}"

    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13"'
    center_x, center_y = WIDTH // 2, HEIGHT // 2
    below = f"tokens seen, millions (0 to {last_x:.1f})"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {view}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{center_x}" y="{HEIGHT - 12}" text-anchor="middle">{below}</text>',
        f'<text x="16" y="{center_y}" text-anchor="middle" transform="rotate(-90 16 {center_y})">nats per token</text>',
    ]
    for loss in range(int(top) + 1):
        y = HEIGHT - MARGIN - loss / top * (HEIGHT - 2 * MARGIN)
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#dddddd"/>')
        parts.append(f'<text x="{MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>')
    for index, (name, (label, color)) in enumerate(LINES.items()):
        points = " ".join(place(row["tokens"], row[name]) for row in rows)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        right, line_y = WIDTH - MARGIN - 8, MARGIN + 18 * index
        parts.append(f'<text x="{right}" y="{line_y}" fill="{color}" text-anchor="end">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Command line: the CSV to read, the SVG to write."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    with source.open(encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    target.write_text(draw(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
