"""`baton replay`: what placement policies make of a trace, on a simulated fleet. Imports neither ray nor jax."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.replay_page import draw
from engine_core.errors import ConfigError
from router.placement import PlacementConfig
from router.simulator.autoscale import (
    JUDGED_S,
    Bill,
    StaticFleet,
    planner_config,
    play,
    smallest_static,
)
from router.simulator.cluster import Crash, Scenario
from router.simulator.experiment import TERMS, Results, run_all
from router.simulator.oracle import capacity
from router.simulator.outcome import Outcome, Slo
from router.simulator.policies import POLICIES
from router.simulator.profile import PROFILES, WorkerProfile, read_profile
from router.simulator.synthesis import Shape, synthesize, warp
from router.simulator.trace import BLOCK_TOKENS, Trace, read_trace, write_trace

EPILOG = """\
A trace is a file of JSON lines, each with timestamp (ms), input_length, output_length and hash_ids: one id for each 512
tokens of the prompt (--block-tokens); equal ids behind equal prefixes mean equal tokens. This is the form of the
Mooncake project's public traces. The router's own index, cost model, placement and admission run against simulated
workers; with one seed, one result.

examples:
  baton replay --trace trace.jsonl --policy joint --policy round-robin --prefill 4 --decode 4 --load 0.8
  baton replay --trace trace.jsonl --all --load 0.4 --load 0.8 --load 1.2 --plot policies.html
  baton replay --trace trace.jsonl --ablate --load 0.8            joint placement with each cost term switched off
  baton replay --trace trace.jsonl --planner --static --warp 0.7@3600
  baton replay --trace trace.jsonl --crash prefill-1@60+30 --lose-events 0.01
  baton replay --synthesize mine.jsonl --requests 5000 --rate-rps 4 --turns 3 --system-tokens 1024
  baton plan --model Qwen/Qwen3-32B --topology v6e-8 --json > plan.json
  baton replay --trace mine.jsonl --profile plan.json"""

WINDOWS_MET = 0.95  # share of windows in which a fleet shall meet the objective

COLUMNS = (
    ("goodput/s", "goodput_rps", "{:.2f}"),
    ("good", "good_share", "{:.1%}"),
    ("refused", "refused", "{}"),
    ("TTFT p50 ms", "ttft_p50_ms", "{:.0f}"),
    ("p90", "ttft_p90_ms", "{:.0f}"),
    ("p99", "ttft_p99_ms", "{:.0f}"),
    ("ITL p50 ms", "itl_p50_ms", "{:.1f}"),
    ("p99", "itl_p99_ms", "{:.1f}"),
    ("hits", "hit_ratio", "{:.1%}"),
    ("of oracle", "oracle_share", "{:.1%}"),
    ("fetched", "fetched_ratio", "{:.1%}"),
    ("local", "local_prefills", "{}"),
    ("spread P", "prefill_spread", "{:.2f}"),
    ("D", "decode_spread", "{:.2f}"),
    ("KV moved GB", "transferred_gb", "{:.0f}"),
)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status. Raises ConfigError."""
    arguments = build_parser().parse_args(argv)
    if arguments.synthesize:
        trace = synthesize(_shape(arguments), arguments.seed)
        write_trace(trace, arguments.synthesize)
        sys.stderr.write(f"{arguments.synthesize}: {_describe(trace)}\n")
        if not arguments.trace:
            return 0
    trace = _trace(arguments)
    if arguments.planner:
        return _plan(arguments, trace)
    scenarios = _scenarios(arguments)
    results = run_all(trace, scenarios, tuple(arguments.load), arguments.jobs)
    if arguments.plot:
        arguments.plot.write_text(draw(results, str(arguments.trace)), encoding="utf-8")
    if arguments.json:
        sys.stdout.write(json.dumps(as_json(results)) + "\n")
    else:
        sys.stdout.write(describe(results))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        prog="baton replay",
        description="Replay a trace of requests against a simulated fleet, under one or more placement policies.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--trace", type=Path, metavar="FILE", help="what is asked, as JSON lines")
    add("--policy", action="append", choices=POLICIES, metavar="NAME", help=f"repeatable: {', '.join(POLICIES)}")
    add("--all", action="store_true", help="all policies")
    add("--ablate", action="store_true", help="joint placement, then without each of its terms")
    add("--without", action="append", choices=TERMS, default=[], metavar="TERM", help=f"repeatable: {', '.join(TERMS)}")
    add("--prefill", type=_count(0), default=4, metavar="N", help="prefill workers (default 4)")
    add("--decode", type=_count(1), default=4, metavar="N", help="decode workers (default 4)")
    add("--load", action="append", type=_positive, default=[], metavar="X", help=_LOAD_HELP)
    add("--profile", default="qwen3-32b-tpu7x", metavar="NAME_OR_FILE", help=_PROFILE_HELP)
    add("--slo-ttft-ms", type=_positive, default=5000.0, metavar="MS", help="good: first token by then (default 5000)")
    add("--slo-itl-ms", type=_positive, default=50.0, metavar="MS", help="good: mean time per token (default 50)")
    add("--max-wait-s", type=_positive, default=60.0, metavar="S", help=_WAIT_HELP)
    add("--crash", action="append", type=_crash, default=[], metavar="WORKER@S+S", help="dies then, for so long")
    add("--slow", action="append", type=_slow, default=[], metavar="WORKER=X", help="takes X times as long for a step")
    add("--lose-events", type=_share, default=0.0, metavar="X", help="share of block events that never arrive")
    add("--requests", type=_count(1), metavar="N", help="only the first N; or how many to synthesize")
    add("--block-tokens", type=_count(1), default=BLOCK_TOKENS, metavar="N", help="tokens per hash id (default 512)")
    add("--warp", type=_warp, metavar="SWING@S", help="let the rate swing by this share with this period")
    add("--seed", type=int, default=0, help="of all that is random (default 0)")
    add("--jobs", type=_count(1), default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
    add("--plot", type=Path, metavar="FILE", help="write an HTML page with plots")
    add("--planner", action="store_true", help="let the planner scale the fleet, from --prefill and --decode on")
    add("--advise", action="store_true", help="with --planner: print what it did, and why")
    add("--static", action="store_true", help="with --planner: search the smallest fixed fleet that does as well")
    add("--budget", type=_count(2), default=16, metavar="N", help="with --planner: slices in all (default 16)")
    add(
        "--flip-s",
        type=float,
        default=0.0,
        metavar="S",
        help="with --planner: a change of role takes so long (0: none)",
    )
    add("--start-s", type=_positive, metavar="S", help="until an ordered slice serves (default: the profile's)")
    add("--json", action="store_true", help="print one JSON object")
    add("--synthesize", type=Path, metavar="FILE", help="write a trace of the shape that these flags say:")
    for field in dataclasses.fields(Shape):
        if field.name not in ("requests", "block_tokens"):
            flag = "--" + field.name.replace("_", "-")
            add(flag, type=type(field.default), metavar="X", help=f"(default {field.default:g})")
    return parser


_LOAD_HELP = "offered load relative to what the fleet can do, by scaling time; repeatable (default: the trace's clock)"
_PROFILE_HELP = f"how fast workers are: {', '.join(PROFILES)}, or a file (see docs/replay.md)"
_WAIT_HELP = "requests whose first token would take longer are refused, as the gateway's max_wait_s (default 60)"


def _plan(arguments: argparse.Namespace, trace: Trace) -> int:
    """The planner's run, and the smallest fixed fleet that meets the objective in as many windows as it shall."""
    scenario = _scenario(arguments, "joint", dict.fromkeys(arguments.without, 0))
    if arguments.start_s:
        profile = dataclasses.replace(scenario.profile, start_s=arguments.start_s)
        scenario = dataclasses.replace(scenario, profile=profile)
    if arguments.load:
        can = capacity(trace, scenario.profile, scenario.num_prefill, scenario.num_decode)
        trace = trace.scaled(len(trace.requests) / trace.duration_s / (arguments.load[-1] * can.rps))
    config = planner_config(scenario, arguments.budget, arguments.flip_s)
    bill, outcome = play(trace, scenario, config)
    tried: list[StaticFleet] = []
    if arguments.static:
        tried = smallest_static(trace, scenario, config.attainment, WINDOWS_MET, arguments.budget, arguments.jobs)
    met = [fleet for fleet in tried if not fleet.gave_up and fleet.windows_met >= WINDOWS_MET]
    best = min(met, key=lambda fleet: (fleet.slice_hours, -fleet.windows_met), default=None)
    if arguments.json:
        answer = {
            "planner": dataclasses.asdict(bill),
            "outcome": dataclasses.asdict(outcome),
            "static": [dataclasses.asdict(fleet) for fleet in tried],
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        return 0
    if arguments.advise:
        sys.stdout.write("\n".join(bill.plans) + "\n\n")
    sys.stdout.write(_describe_bill(trace, bill, outcome, tried, best))
    return 0


def _describe_bill(
    trace: Trace, bill: Bill, outcome: Outcome, tried: Sequence[StaticFleet], best: StaticFleet | None
) -> str:
    lines = [
        _describe(trace),
        f"planner: {bill.slice_hours:.2f} slice-hours, at most {bill.peak_slices} slices, {len(bill.plans)} changes; "
        f"objective met in {bill.windows_met:.1%} of the windows of {JUDGED_S:.0f} s; "
        f"{outcome.goodput_rps:.2f} good requests/s",
    ]
    lines += [
        f"fixed {fleet.prefill}P{fleet.decode}D: {fleet.slice_hours:.2f} slice-hours, objective met in "
        f"{'less than ' if fleet.gave_up else ''}{WINDOWS_MET if fleet.gave_up else fleet.windows_met:.1%}"
        for fleet in tried
    ]
    if best is not None:
        lines.append(
            f"smallest fixed fleet: {best.prefill}P{best.decode}D, {best.slice_hours:.2f} slice-hours, objective met "
            f"in {best.windows_met:.1%}; the planner needs {1 - bill.slice_hours / best.slice_hours:.1%} less"
        )
    return "\n".join(lines) + "\n"


def as_json(results: Results) -> dict[str, Any]:
    """One object; of several loads, `policies` is about the last, and `loads` has all."""
    by_load = [{**point.facts(), "policies": _policies(point.outcomes)} for point in results.points]
    last = by_load[-1]
    return {**last, **results.facts(), **({"loads": by_load} if len(by_load) > 1 else {})}


def _policies(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}


def describe(results: Results) -> str:
    """Tables for people."""
    lines = [
        f"{results.description}; {results.fleet}",
        f"hits: {results.ideal_hit_ratio:.1%} with an infinite cache, {results.oracle_hit_ratio:.1%} if the caches of "
        f"all workers that read prompts were one",
        "",
    ]
    for point in results.points:
        lines.append(f"offered {point.offered_rps:.2f} requests/s, load {point.load:.2f}")
        lines += _table(point.outcomes, results.oracle_hit_ratio)
        lines.append("")
    return "\n".join(lines)


def _table(outcomes: Mapping[str, Outcome], oracle: float) -> list[str]:
    rows = [["policy", *(title for title, _, _ in COLUMNS)]]
    for name, outcome in outcomes.items():
        values = dataclasses.asdict(outcome)
        values["good_share"] = outcome.good / outcome.requests
        values["oracle_share"] = outcome.hit_ratio / oracle if oracle else 1.0
        rows.append([name, *(form.format(values[key]) for _, key, form in COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]


def _describe(trace: Trace) -> str:
    count = len(trace.requests)
    return f"{count} requests in {trace.duration_s:.0f} s, {trace.input_tokens / count:.0f} prompt tokens each"


def _trace(arguments: argparse.Namespace) -> Trace:
    path = arguments.trace
    if path is None:
        raise ConfigError("--trace FILE is needed (or --synthesize FILE)")
    trace = read_trace(path, arguments.block_tokens, arguments.seed)
    if arguments.requests:
        trace = trace.head(arguments.requests)
    return warp(trace, *arguments.warp) if arguments.warp else trace


def _shape(arguments: argparse.Namespace) -> Shape:
    names = [field.name for field in dataclasses.fields(Shape)]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return Shape(**given)


def _scenarios(arguments: argparse.Namespace) -> dict[str, Scenario]:
    """By name, in the order of the table."""
    for crash in arguments.crash:
        _check_worker("--crash", crash.worker_id, arguments)
    for worker_id, _ in arguments.slow:
        _check_worker("--slow", worker_id, arguments)
    names = (
        list(POLICIES) if arguments.all else arguments.policy or ([] if arguments.ablate else ["joint", "round-robin"])
    )
    if not arguments.prefill and set(names) - {"joint"}:
        raise ConfigError("--prefill 0 is for the joint policy only")
    base = dict.fromkeys(arguments.without, 0)
    scenarios = {name: _scenario(arguments, name, base) for name in dict.fromkeys(names)}
    if arguments.ablate:
        scenarios["joint"] = _scenario(arguments, "joint", base)
        for term in TERMS:
            scenarios[f"joint without {term}"] = _scenario(arguments, "joint", {**base, term: 0})
    return scenarios


def _scenario(arguments: argparse.Namespace, policy: str, off: Mapping[str, int]) -> Scenario:
    switched: dict[str, Any] = {TERMS[term]: value for term, value in off.items()}
    return Scenario(
        policy=policy,
        placement=PlacementConfig(**switched),
        num_prefill=arguments.prefill,
        num_decode=arguments.decode,
        profile=_profile(arguments.profile),
        speeds=dict(arguments.slow),
        crashes=tuple(arguments.crash),
        lost_events=arguments.lose_events,
        max_wait_s=arguments.max_wait_s,
        slo=Slo(ttft_s=arguments.slo_ttft_ms / 1e3, itl_s=arguments.slo_itl_ms / 1e3),
        seed=arguments.seed,
    )


def _profile(name: str) -> WorkerProfile:
    return PROFILES[name] if name in PROFILES else read_profile(Path(name))


def _check_worker(flag: str, worker_id: str, arguments: argparse.Namespace) -> None:
    role, _, number = worker_id.rpartition("-")
    count = {"prefill": arguments.prefill, "decode": arguments.decode}.get(role, 0)
    if not number.isdigit() or int(number) >= count:
        raise ConfigError(f"{flag}: there is no worker {worker_id}; they are called prefill-0, decode-0 and so on")


def _crash(text: str) -> Crash:
    worker, _, times = text.partition("@")
    at, _, down = times.partition("+")
    return Crash(worker_id=worker, at_s=float(at), down_s=float(down))


def _slow(text: str) -> tuple[str, float]:
    worker, _, factor = text.partition("=")
    return worker, _positive(factor)


def _warp(text: str) -> tuple[float, float]:
    swing, _, period = text.partition("@")
    return _share(swing), _positive(period)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in 0..1, not {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return value


class _count:
    """Argparse type: an integer of at least so much."""

    def __init__(self, least: int) -> None:
        self._least = least

    def __call__(self, text: str) -> int:
        """Parse."""
        value = int(text)
        if value < self._least:
            raise argparse.ArgumentTypeError(f"must be at least {self._least}, not {text}")
        return value
