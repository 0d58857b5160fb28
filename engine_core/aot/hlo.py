"""Which collectives a compiled program runs, counted from its text, loops included. Host module."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"(\w+)=(?:%([\w.\-]+)|\{(%[^}]*)\})")
_OPERATION = re.compile(rf"^(?:ROOT )?%[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+|f8\w+)\[([\d,]*)\]")
_TRIPS = re.compile(r"compare\(.*direction=LT")
_CONSTANT = re.compile(r"constant\((\d+)\)")
_BITS = {"pred": 8, "bf16": 16}


@dataclass(frozen=True, slots=True)
class Collective:
    """One kind of collective in one step.

    Attributes:
        count: how often it runs.
        num_bytes: of its results on one device, all runs together.
        largest_bytes: of the largest result.
    """

    count: int
    num_bytes: int
    largest_bytes: int


def count_collectives(text: str) -> dict[str, Collective]:
    """Read a compiled HLO module.

    A loop's body counts as often as its condition `index < constant` says, or once where that is not known; of a
    conditional every branch counts.

    Args:
        text: `compiled.as_text()`.

    Returns:
        By kind, those that occur.
    """
    computations, entry = _split(text)
    runs: defaultdict[str, int] = defaultdict(int)
    _visit(entry, 1, computations, runs)
    found: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, times in runs.items():
        for line in computations[name]:
            if match := _OPERATION.match(line):
                found[match[2]].append((times, _result_bytes(match[1], match[3] is not None)))
    return {
        kind: Collective(
            count=sum(times for times, _ in uses),
            num_bytes=sum(times * size for times, size in uses),
            largest_bytes=max(size for _, size in uses),
        )
        for kind, uses in sorted(found.items())
    }


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current:
            computations[current].append(line.strip())
    return computations, entry


def _visit(name: str, times: int, computations: Mapping[str, list[str]], runs: defaultdict[str, int]) -> None:
    runs[name] += times
    for line in computations[name]:
        called = [
            (match[1], one.strip().lstrip("%"))
            for match in _CALLED.finditer(line)
            for one in (match[2] or match[3]).split(",")
        ]
        bodies = {role: target for role, target in called if target in computations}
        trips = _trips(computations[bodies["condition"]]) if {"condition", "body"} <= bodies.keys() else 1
        for role, target in called:
            if target in computations and role != "condition":
                _visit(target, times * (trips if role == "body" else 1), computations, runs)


def _trips(condition: list[str]) -> int:
    """Of a loop that counts from 0 to a constant, as `lax.scan` makes them; else 1."""
    limits = [int(found[1]) for line in condition if (found := _CONSTANT.search(line))]
    compares = any(_TRIPS.search(line) for line in condition)
    return limits[0] if compares and len(limits) == 1 else 1


def _result_bytes(shape: str, asynchronous: bool) -> int:
    sizes = []
    for match in _ARRAY.finditer(shape):
        bits = _BITS.get(match[1]) or int(re.sub(r"\D.*", "", match[1][1:]))
        count = 1
        for dim in filter(None, match[2].split(",")):
            count *= int(dim)
        sizes.append(count * bits // 8)
    if not sizes:
        return 0
    return max(sizes) if asynchronous else sum(sizes)  # a start's result holds its operands and scratch as well
