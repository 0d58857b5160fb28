"""`baton bench kv`: how fast KV moves from a prefill to a decode worker, beside everything else that moves bytes here.

Two processes, each with its data plane, and the endpoints that workers use, without the workers: from the moment the
blocks are on the host until decode has verified the last of them. Every way moves the same bytes in turn, round after
round, so that what else happens on the machine meets all alike; figures are medians, ratios are medians of each
round's ratio, and beside them stand the rounds that were disturbed least. Other libraries take part where they are
installed.

Over loopback the cores that copy are the limit. `--link-gbit` adds what happens where the link is: raw sockets and
Baton's send at so many Gbit/s and no faster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.kv_baselines import Digests, Memcpy, RawSockets, SameWork, touched
from benchmarks.kv_hand_off import HandOff, Way
from benchmarks.kv_libraries import JaxTransfer, MooncakeEngine, NixlAgent, has
from benchmarks.table import Table
from engine_core.config import EngineConfig
from kv_transfer.compiled.digester import build_digester, open_digester
from kv_transfer.layout import BlockLayout
from kv_transfer.wire import Transport

LAYOUT = BlockLayout(num_layers=16, page_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")  # 1 MiB a block
SMALL = BlockLayout(num_layers=16, page_size=16, num_kv_heads=1, head_dim=8, dtype="bfloat16")  # 8 KiB a block
PROMPT_BLOCKS = 512 // LAYOUT.page_size
RAW_CONNECTIONS = (1, 2, 4)
LINK_BYTES = 256 << 20  # moved over a link at most
WARM_UP_MOVES = 3  # of the largest size: arenas have been written to everywhere, as memcpy's target and in long service
OWN_MEMORY = ("memcpy", "checksum, one pass", "copy, digest, verify")  # within this process
OTHERS: dict[str, tuple[str, Callable[[np.ndarray], Way]]] = {
    "jax": ("jax", JaxTransfer),
    "nixl": ("nixl", NixlAgent),
    "mooncake": ("mooncake", MooncakeEngine),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = _parser().parse_args(argv)
    sizes = [mebibytes << 20 for mebibytes in args.sizes]
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    library = build_digester(args.compile_cache)
    fixed = _fixed_cost(args.rounds, library)
    ways = _open_ways(max(sizes), args.connections, args.others, library)
    try:
        for way in ways:
            for _ in range(WARM_UP_MOVES):
                way.move(max(sizes))
        moves = [_measure(ways, size, args.rounds) for size in sizes]
    finally:
        for way in ways:
            way.close()
    size = min(max(sizes), LINK_BYTES)
    links = {gbit: _over_link(gbit, size, args.connections, args.rounds, library) for gbit in args.link_gbit}
    _print_tables(moves, fixed, links)
    if args.json:
        print(json.dumps(summary(moves, fixed, links)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton bench kv", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 16, 256, 1024], metavar="MIB", help="of a hand-off")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--connections", type=int, default=2, help="of one pair over TCP")
    parser.add_argument(
        "--link-gbit",
        nargs="*",
        type=_positive,
        default=[],
        metavar="GBIT",
        help="also over links of so many Gbit/s (Linux), one after the other",
    )
    parser.add_argument(
        "--others",
        nargs="*",
        choices=list(OTHERS),
        default=list(OTHERS),
        help="other libraries; how to install them is in benchmarks/kv_libraries.py",
    )
    kept = EngineConfig().compile_cache
    parser.add_argument("--compile-cache", default=kept, help=f"of compiled digests (default {kept}; empty: Python's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a rate")
    return value


@dataclass(slots=True)
class Moves:
    """One size: per way, seconds of each round and CPU seconds per round."""

    num_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)

    def rate(self, name: str) -> float:
        """Median GB/s."""
        return self.num_bytes / statistics.median(self.seconds[name]) / 1e9

    def best_rate(self, name: str) -> float:
        """GB/s of the round that was disturbed least."""
        return self.num_bytes / min(self.seconds[name]) / 1e9

    @property
    def raw(self) -> list[str]:
        """Ways with raw sockets."""
        return [name for name in self.seconds if name.startswith("raw")]

    @property
    def best_raw(self) -> str:
        """The fastest of them."""
        return max(self.raw, key=self.rate)

    def ratio(self, name: str, other: str) -> float:
        """How many times as fast as `other`: the median over rounds."""
        return statistics.median(
            theirs / mine for mine, theirs in zip(self.seconds[name], self.seconds[other], strict=True)
        )


def _open_ways(max_bytes: int, num_connections: int, others: Sequence[str], library: Path | None) -> list[Way]:
    digester = open_digester(library)
    source = touched(max_bytes)
    source[:] = np.random.default_rng(0).integers(0, 256, max_bytes, np.uint8)
    ways: list[Way] = [
        Memcpy(source),
        Digests(source, LAYOUT, digester),
        SameWork(source, LAYOUT, digester),
        HandOff("shared memory", Transport.SHARED_MEMORY, LAYOUT, source, 1, planes=True, library=library),
        HandOff("TCP", Transport.TCP, LAYOUT, source, num_connections, planes=True, library=library),
        HandOff("shared memory, no planes", Transport.SHARED_MEMORY, LAYOUT, source, 1, planes=False, library=library),
        HandOff("TCP, no planes", Transport.TCP, LAYOUT, source, num_connections, planes=False, library=library),
        *(RawSockets(n, source) for n in RAW_CONNECTIONS),
    ]
    for name in others:
        module, open_way = OTHERS[name]
        if not has(module):
            print(f"{name} is not installed", flush=True)
            continue
        try:
            ways.append(open_way(source))
        except (OSError, EOFError, ImportError, RuntimeError) as error:
            print(f"{name} cannot be started: {error or type(error).__name__}", flush=True)
    return ways


def _measure(ways: Sequence[Way], num_bytes: int, rounds: int) -> Moves:
    moves = Moves(num_bytes)
    for way in ways:
        way.move(num_bytes)
        moves.seconds[way.name] = []
        moves.cpu_s[way.name] = -way.cpu_s()
    for _ in range(rounds):
        for way in ways:
            moves.seconds[way.name].append(way.move(num_bytes))
    for way in ways:
        moves.cpu_s[way.name] = (moves.cpu_s[way.name] + way.cpu_s()) / rounds
    return moves


def _over_link(gbit: float, num_bytes: int, num_connections: int, rounds: int, library: Path | None) -> Moves:
    """One size over a link of `gbit` Gbit/s: raw sockets and TCP with planes."""
    source = touched(num_bytes)
    ways: list[Way] = [RawSockets(n, source, gbit) for n in RAW_CONNECTIONS]
    ways.append(
        HandOff("TCP", Transport.TCP, LAYOUT, source, num_connections, planes=True, library=library, link_gbit=gbit)
    )
    try:
        for _ in range(WARM_UP_MOVES):
            ways[-1].move(num_bytes)
        return _measure(ways, num_bytes, rounds)
    finally:
        for way in ways:
            way.close()


def _fixed_cost(rounds: int, library: Path | None) -> dict[str, float]:
    """Milliseconds of a whole hand-off, ticket and all, of a 512-token prompt whose blocks are small."""
    costs = {}
    for name, transport in (("shared memory", Transport.SHARED_MEMORY), ("TCP", Transport.TCP)):
        way = HandOff(
            name,
            transport,
            SMALL,
            np.zeros(PROMPT_BLOCKS * SMALL.block_bytes, np.uint8),
            1,
            planes=True,
            library=library,
        )
        way.whole_s(PROMPT_BLOCKS)
        costs[name] = statistics.median(way.whole_s(PROMPT_BLOCKS) for _ in range(5 * rounds)) * 1e3
        way.close()
    return costs


def _print_tables(moves: Sequence[Moves], fixed: dict[str, float], links: dict[float, Moves]) -> None:
    table = Table("way", *(f"{each.num_bytes >> 20} MiB: ms (GB/s; best)" for each in moves), "CPU s/GB at the largest")
    for name in moves[0].seconds:
        cells = [
            f"{statistics.median(each.seconds[name]) * 1e3:.2f} ({each.rate(name):.2f}; {each.best_rate(name):.2f})"
            for each in moves
        ]
        table.add(name, *cells, f"{moves[-1].cpu_s[name] / moves[-1].num_bytes * 1e9:.3f}")
    table.print()
    table = Table("fixed cost of a hand-off, 512 tokens", "ms")
    for name, milliseconds in fixed.items():
        table.add(name, f"{milliseconds:.2f}")
    table.print()
    if links:
        table = Table("link, Gbit/s (GB/s)", "best raw sockets, GB/s", "TCP, GB/s", "ratio", "CPU s/GB of both")
        for gbit, at in links.items():
            raw = at.best_raw
            used = " and ".join(f"{at.cpu_s[name] / at.num_bytes * 1e9:.3f}" for name in (raw, "TCP"))
            rates = (f"{at.rate(raw):.2f} ({raw.removeprefix('raw sockets ')})", f"{at.rate('TCP'):.2f}")
            table.add(f"{gbit:g} ({gbit / 8:.2f})", *rates, f"{at.ratio('TCP', raw):.3f}", used)
        table.print()


def summary(moves: Sequence[Moves], fixed: dict[str, float], links: dict[float, Moves]) -> dict[str, object]:
    """The JSON object: ratios at 256 MiB where that was measured, else at the largest size."""
    at = next((each for each in moves if each.num_bytes == 256 << 20), moves[-1])
    raw = at.raw
    others = {}
    for name in at.seconds:
        if name not in (*OWN_MEMORY, *raw) and not name.startswith(("shared memory", "TCP")):
            others[name] = round(at.ratio("TCP", name), 3)
    return {
        "shm_vs_memcpy": round(at.ratio("shared memory", "memcpy"), 3),
        "tcp_vs_raw": round(at.ratio("TCP", at.best_raw), 3),
        "tcp_vs_raw_at": {f"{gbit:g}": round(each.ratio("TCP", each.best_raw), 3) for gbit, each in links.items()},
        "tcp_gb_s_at": {f"{gbit:g}": round(each.rate("TCP"), 3) for gbit, each in links.items()},
        "shm_vs_same_work": round(at.ratio("shared memory", "copy, digest, verify"), 3),
        "fixed_ms_512": round(min(fixed.values()), 3),
        "vs": others,
        "of_best_rounds": {
            "shm_vs_memcpy": round(at.best_rate("shared memory") / at.best_rate("memcpy"), 3),
            "tcp_vs_raw": round(at.best_rate("TCP") / max(map(at.best_rate, raw)), 3),
        },
        "gb_s": {name: {str(each.num_bytes >> 20): round(each.rate(name), 3) for each in moves} for name in at.seconds},
        "cpu_s_per_gb": {name: round(at.cpu_s[name] / at.num_bytes * 1e9, 4) for name in at.seconds},
        "load_average": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    main()
