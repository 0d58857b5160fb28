"""`baton chaos`: start a cluster, learn what it says, disturb it, compare, count what is left over."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos.cluster import Cluster, linked_checkpoint, vocab_size
from benchmarks.chaos.fate import Fate
from benchmarks.chaos.faults import Faults
from benchmarks.chaos.load import Load, chaos_requests
from benchmarks.chaos.station import Station

CONNECTIONS = 2  # of a pair of workers over TCP
SETTLE_S = 15.0  # from the last stream until nothing is held
WHOLE_S = 240.0  # until every worker serves again
EPILOG = """\
Numerics are strict: every stream must say, token by token, what it said undisturbed. Exit status: 0 where nothing was
lost, changed or leaked, 1 where something was.

examples:
  baton chaos --minutes 5
  baton chaos --minutes 5 --seed 7 --json | tail -1 | jq '{streams, faults, mismatched, lost, leaked}'"""


@dataclass(slots=True)
class Report:
    """What came of a run.

    Attributes:
        retried: streams whose gateway was killed, asked again as a whole.
        leaked: pages, slots, tickets and sockets.
        changed: workers and gateways that nobody harmed and whose process is another one now.
        longest_gap_s, gaps_s: see `load.Score`.
    """

    seed: int
    seconds: float
    streams: int = 0
    faults: int = 0
    retried: int = 0
    mismatched: int = 0
    lost: int = 0
    leaked: int = 0
    changed: int = 0
    longest_gap_s: float = 0.0
    gaps_s: dict[str, float] = field(default_factory=dict)
    settle_s: float = 0.0
    fault_kinds: dict[str, int] = field(default_factory=dict)
    leaks: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing came of the faults."""
        return bool(self.streams) and not (self.mismatched or self.lost or self.leaked or self.changed)


def main(argv: Sequence[str]) -> int:
    """Entry point; see EPILOG for the exit status."""
    known = build_parser().parse_args(argv)
    counts = (known.prefill, known.decode, known.gateways, known.clients, known.requests)
    if known.minutes <= 0 or min(counts) < 1:
        sys.stderr.write("baton: error: --minutes must be positive, numbers of processes and clients at least 1\n")
        return 2
    report = asyncio.run(run(known))
    print(describe(report))
    if known.json:
        print(json.dumps(asdict(report)))
    return 0 if report.is_clean else 1


def build_parser() -> argparse.ArgumentParser:
    """The grammar."""
    parser = argparse.ArgumentParser(
        prog="baton chaos",
        description="Disturb a real cluster on this machine under load, and prove that nothing came of it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of disturbance (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of requests and faults (default 0)")
    parser.add_argument("--prefill", type=int, default=2, metavar="N", help="prefill workers (default 2)")
    parser.add_argument("--decode", type=int, default=2, metavar="N", help="decode workers (default 2)")
    parser.add_argument(
        "--gateways", type=int, default=2, metavar="N", help="gateways; a lone one is not harmed (default 2)"
    )
    parser.add_argument("--clients", type=int, default=6, metavar="N", help="streams at a time (default 6)")
    parser.add_argument("--requests", type=int, default=40, metavar="N", help="different ones (default 40)")
    parser.add_argument("--max-tokens", type=int, default=100, dest="max_tokens", metavar="N", help="of an answer")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="(default: the demo model)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


async def run(known: argparse.Namespace) -> Report:
    """The whole of it; every process started here has ended by the return."""
    directory = Path(tempfile.mkdtemp(prefix="baton-chaos-"))
    checkpoint = known.checkpoint or Path(sys.modules["deploy"].__path__[0]) / "demo_model"
    station = Station(random.Random(known.seed))
    try:
        model_dir = linked_checkpoint(checkpoint, directory)
        await station.start(model_dir)
        flags = ["--numerics", "strict", "--cache.num_pages", "128", "--batch.max_model_len", "512"]
        flags += ["--batch.num_slots", "8", "--batch.strict_rows", "16", "--model", str(model_dir)]
        flags += ["--prefill", str(known.prefill), "--decode", str(known.decode), "--gateway.local_prefill_tokens", "0"]
        flags += ["--fleet.backoff_s", "0.1"]
        began_at = time.monotonic()
        cluster = Cluster(model_dir, directory, known.gateways, flags)
        try:
            await cluster.start()
            await cluster.until_ready(WHOLE_S)
            say(f"{known.prefill} prefill and {known.decode} decode workers serve after {_since(began_at)}")
            return await disturb(known, cluster, station, vocab_size(checkpoint))
        finally:
            await asyncio.to_thread(cluster.stop)
    finally:
        await station.close()
        shutil.rmtree(directory, ignore_errors=True)


async def disturb(known: argparse.Namespace, cluster: Cluster, station: Station, vocab: int) -> Report:
    """Learn the truth, then harm and compare."""
    fate = Fate()
    load = Load(cluster.url, cluster.model, chaos_requests(known.requests, vocab, known.max_tokens, known.seed), fate)
    began_at = time.monotonic()
    await load.undisturbed(known.clients)
    say(f"{known.requests} requests answered undisturbed in {_since(began_at)}")
    load.score.longest_gap_s = 0.0
    before, gateways = await _lives(cluster), set(cluster.gateways())
    faults = Faults(cluster, station, fate, random.Random(known.seed), say)
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(known.minutes * 60, over.set)
    began_at = time.monotonic()
    await asyncio.gather(load.until(over, known.clients), faults.until(over))
    report = Report(known.seed, time.monotonic() - began_at)
    await cluster.until_ready(WHOLE_S)
    began_at = time.monotonic()
    report.leaks = await settled(cluster, station, faults)
    report.settle_s = time.monotonic() - began_at
    after = await _lives(cluster)
    changed = {worker for worker in before if before[worker] != after.get(worker)}
    score = load.score
    report.streams, report.mismatched, report.lost = score.streams, score.mismatched, score.lost
    report.retried, report.errors = score.retried, score.errors[:10]
    report.longest_gap_s = score.longest_gap_s
    report.gaps_s = {kind: round(seconds, 2) for kind, seconds in sorted(score.gaps_s.items()) if kind}
    report.faults, report.fault_kinds = faults.counts.total(), dict(faults.counts)
    gone = gateways - set(cluster.gateways()) - faults.killed_gateways
    report.leaked, report.changed = sum(report.leaks.values()), len(changed - faults.victims) + len(gone)
    return report


async def settled(cluster: Cluster, station: Station, faults: Faults) -> dict[str, int]:
    """What is still held, once nothing is or the time for it is over."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        held: dict[str, int] = {"pages": 0, "slots": 0, "tickets": 0}
        for post in station.posts.values():
            with contextlib.suppress(OSError, TimeoutError):
                for name, count in (await post.ask()).items():
                    held[name] += count
        held["sockets"] = faults.open_sockets(CONNECTIONS) + cluster.num_client_sockets()
        if not any(held.values()) or time.monotonic() > deadline:
            return held
        await asyncio.sleep(0.2)


async def _lives(cluster: Cluster) -> dict[str, Any]:
    return {member.worker_id: (member.incarnation, member.pid) for member in (await cluster.status()).members}


def describe(report: Report) -> str:
    """For people."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.fault_kinds.items()))
    gaps = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in report.gaps_s.items())
    leaks = ", ".join(f"{count} {name}" for name, count in report.leaks.items())
    lines = [
        f"seed {report.seed}: {report.streams} streams, {report.faults} faults in {report.seconds:.0f} s",
        f"  faults: {kinds}",
        f"  mismatched {report.mismatched}, lost {report.lost}, leaked {report.leaked} ({leaks})",
        f"  broken by the death of their gateway, and asked again: {report.retried}",
        f"  processes changed but the victims: {report.changed}",
        f"  longest gap within a stream, by the latest fault: {gaps}",
        f"  longest but for frozen gateways {report.longest_gap_s:.1f} s; all released within {report.settle_s:.1f} s",
        *(f"  {error}" for error in report.errors),
        "nothing came of it" if report.is_clean else "FAILED",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{text}\n")


def _since(began_at: float) -> str:
    return f"{time.monotonic() - began_at:.1f} s"
