"""Traces of requests in the public form of the Mooncake project: JSON lines of arrival, lengths and block ids.

A line holds `timestamp` (milliseconds from the start), `input_length` and `output_length` (tokens) and `hash_ids`: one
id for each `block_tokens` tokens of the prompt, the last block possibly partial. Equal ids behind equal prefixes mean
equal tokens. Source of the form: Mooncake (Qin et al., FAST 2025), FAST25-release/traces.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine_core.errors import ConfigError

BLOCK_TOKENS = 512  # of the published traces
_SHARED = 0.5  # a clock on which so many requests coincide with others ticks too coarsely to be taken at its word

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request.

    Attributes:
        arrival_s: from the start of the trace.
        input_tokens, output_tokens: lengths, at least 1.
        blocks: `[ceil(input_tokens / block_tokens)] i32`, ids of the prompt's blocks.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    blocks: Ints


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        requests: at least one.
        block_tokens: tokens per block.
    """

    requests: tuple[TracedRequest, ...]
    block_tokens: int

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last, and the mean gap between two behind it."""
        count = len(self.requests)
        span = self.requests[-1].arrival_s - self.requests[0].arrival_s
        return span * count / (count - 1) if count > 1 and span > 0 else 1.0

    @property
    def input_tokens(self) -> int:
        """Of all requests."""
        return sum(request.input_tokens for request in self.requests)

    def scaled(self, factor: float) -> Trace:
        """The same requests, `factor` times as far apart."""
        first = self.requests[0].arrival_s
        return Trace(
            tuple(
                TracedRequest((r.arrival_s - first) * factor, r.input_tokens, r.output_tokens, r.blocks)
                for r in self.requests
            ),
            self.block_tokens,
        )

    def head(self, count: int) -> Trace:
        """The first requests only."""
        return Trace(self.requests[:count], self.block_tokens)


class _Row(NamedTuple):
    """A line of the file, checked."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    ids: list[int]


def read_trace(path: Path, block_tokens: int, seed: int) -> Trace:
    """Read a trace, and spread arrivals within the ticks of a coarse clock.

    Args:
        block_tokens: what one id stands for.
        seed: of the spreading.

    Raises:
        ConfigError: naming the line and the field.
    """
    try:
        with path.open(encoding="utf-8") as file:
            rows = [
                _checked(_parsed(line, number, path), number, path, block_tokens)
                for number, line in enumerate(file, 1)
                if line.strip()
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path}: {error}") from None
    if not rows:
        raise ConfigError(f"--trace {path}: no requests")
    rows.sort(key=lambda row: row.arrival_s)
    arrivals = spread(np.array([row.arrival_s for row in rows]), np.random.default_rng(seed))
    return Trace(
        tuple(
            TracedRequest(float(arrival), row.input_tokens, row.output_tokens, blocks)
            for arrival, row, blocks in zip(arrivals, rows, _dense(rows), strict=True)
        ),
        block_tokens,
    )


def write_trace(trace: Trace, path: Path) -> None:
    """Write the same form, times to the millisecond."""
    with path.open("w", encoding="utf-8") as file:
        for request in trace.requests:
            row = {
                "timestamp": round(1e3 * request.arrival_s),
                "input_length": request.input_tokens,
                "output_length": request.output_tokens,
                "hash_ids": request.blocks.tolist(),
            }
            file.write(json.dumps(row) + "\n")


def spread(arrivals_s: Floats, rng: np.random.Generator) -> Floats:
    """Where most requests share their time with others, draw each one's own within its tick; order is kept.

    Args:
        arrivals_s: `[n]`, ascending.
    """
    ticks, counts = np.unique(arrivals_s, return_counts=True)
    if len(ticks) < 2 or counts[counts > 1].sum() < _SHARED * len(arrivals_s):
        return arrivals_s
    usual = float(np.median(np.diff(ticks)))
    widths = np.append(np.minimum(np.diff(ticks), usual), usual)
    parts = [
        tick + width * np.sort(rng.random(count)) for tick, width, count in zip(ticks, widths, counts, strict=True)
    ]
    return np.concatenate(parts)


def _parsed(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{path}:{number}: not a JSON object")
    return row


def _checked(row: dict[str, Any], number: int, path: Path, block_tokens: int) -> _Row:
    for field, least in (("timestamp", 0), ("input_length", 1), ("output_length", 0)):
        value = row.get(field)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < 2**53:
            raise ConfigError(f"{path}:{number}: {field} must be a number of at least {least}, not {value!r}")
    ids = row.get("hash_ids")
    if not isinstance(ids, list) or not all(isinstance(block, int) and abs(block) < 2**63 for block in ids):
        raise ConfigError(f"{path}:{number}: hash_ids must be a list of integers")
    num_tokens = int(row["input_length"])
    expected = -(-num_tokens // block_tokens)
    if len(ids) != expected:
        raise ConfigError(
            f"{path}:{number}: hash_ids has {len(ids)} ids; an input_length of {num_tokens} has {expected} blocks "
            f"of {block_tokens} tokens (--block-tokens)"
        )
    return _Row(row["timestamp"] / 1e3, num_tokens, max(1, int(row["output_length"])), ids)


def _dense(rows: Sequence[_Row]) -> list[Ints]:
    """Ids of any size as small ones."""
    lengths = [len(row.ids) for row in rows]
    _, dense = np.unique(np.array([block for row in rows for block in row.ids], np.int64), return_inverse=True)
    return np.split(dense.astype(np.int32), np.cumsum(lengths)[:-1])
