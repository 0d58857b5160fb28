"""`baton bench pd`: TTFT and ITL of disaggregated against colocated serving, same model, same run, alternating.

Two clusters stand side by side: 1 prefill + 1 decode worker, and 1 worker that does both; real processes, sockets and
gateways. First, prompts of several lengths at several concurrencies. Then the inter-token latency of running streams,
without and with a prefill load beside them; for this part the prefill and decode roles are pinned to a core each, while
the colocated worker has all cores. Last, with the same pins, prompts that the prefill worker has no room to keep and
fetches from the decode worker again (docs/adr/0018), beside new ones of the same length, which it computes: their TTFT,
and the inter-token latency of streams on the decode worker meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.local_cluster import LocalCluster, WorkerSpec
from benchmarks.sse_client import Timeline, stream_completion
from benchmarks.table import Table
from engine_core.config import BatchConfig, CacheConfig, EngineConfig, ModelConfig
from engine_core.types import Role

DEMO = Path(__file__).parents[1] / "deploy" / "demo_model"
VOCAB = 1000  # token ids are drawn below it; every tokenizer has them
SETTLE_S = 0.2
PAGE_SIZE = 16
PARTS = ["ttft", "itl", "donor"]
NUM_GIVEN = 3  # prompts that take turns; of two, the prefill worker might keep one


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = _parser().parse_args(argv)
    results: dict[str, object] = {}
    if "ttft" in args.parts:
        results |= _measure_ttft(args)
    if "itl" in args.parts:
        results |= _measure_itl(args)
    if "donor" in args.parts:
        results |= _measure_donor(args)
    if args.json:
        print(json.dumps(results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton bench pd", description=__doc__)
    parser.add_argument("--model", default=str(DEMO), help="checkpoint directory (default: the demo model)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="prompt lengths")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7, help="requests per cell at concurrency 1; batches at others")
    parser.add_argument("--output", type=int, default=16, help="tokens generated per request")
    parser.add_argument("--streams", type=int, default=4, help="running streams in the ITL part")
    parser.add_argument("--stream-tokens", type=int, default=300, help="tokens of each running stream")
    parser.add_argument("--load-tokens", type=int, default=2048, help="prompt length of the prefill load")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _config(args: argparse.Namespace) -> EngineConfig:
    length = max(*args.tokens, args.load_tokens) + args.stream_tokens + args.output + 64
    return EngineConfig(
        model=ModelConfig(path=args.model),
        cache=CacheConfig(
            num_pages=(max(args.concurrency) + args.streams + 2) * (-(-length // PAGE_SIZE)), page_size=PAGE_SIZE
        ),
        batch=BatchConfig(num_slots=max(8, args.streams + 4, *args.concurrency), max_model_len=length),
        prefix_cache=False,
    )


def _start(args: argparse.Namespace, *, pinned: bool) -> tuple[LocalCluster, LocalCluster]:
    first, second = _cores() if pinned else ((), ())
    config, model = _config(args), Path(args.model)
    print("starting 1 prefill + 1 decode worker ...", flush=True)
    apart = LocalCluster(
        config,
        model,
        [WorkerSpec(Role.PREFILL, "prefill", first), WorkerSpec(Role.DECODE, "decode", second)],
        gateway_cores=first,
    )
    print("starting 1 colocated worker ...", flush=True)
    together = LocalCluster(config, model, [WorkerSpec(Role.DECODE, "colocated")])
    return apart, together


def _cores() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One for each role; none where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return ((cores[0],), (cores[1],)) if len(cores) > 1 else ((), ())


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(10, VOCAB) for _ in range(length)]


# TTFT


@dataclass(slots=True)
class Cell:
    """Samples of one (cluster, prompt length, concurrency)."""

    ttft_s: list[float]
    itl_s: list[float]


def _measure_ttft(args: argparse.Namespace) -> dict[str, object]:
    apart, together = _start(args, pinned=False)
    with apart, together:
        cells = asyncio.run(_alternate({"apart": apart.port, "together": together.port}, args))
    table = Table(
        "prompt", "concurrency", "TTFT apart ms", "TTFT together ms", "ratio", "ITL apart ms", "ITL together ms"
    )
    ratios: dict[int, dict[str, float]] = {}
    for tokens in args.tokens:
        for concurrency in args.concurrency:
            ours, theirs = cells["apart", tokens, concurrency], cells["together", tokens, concurrency]
            ttft = [statistics.median(cell.ttft_s) * 1e3 for cell in (ours, theirs)]
            itl = [statistics.median(cell.itl_s) * 1e3 for cell in (ours, theirs)]
            ratio = round(ttft[0] / ttft[1], 3)
            ratios.setdefault(concurrency, {})[str(tokens)] = ratio
            table.add(tokens, concurrency, *(f"{v:.1f}" for v in ttft), ratio, *(f"{v:.2f}" for v in itl))
    table.print()
    return {"ttft_ratio": ratios[min(ratios)], "ttft_ratio_by_concurrency": {str(c): r for c, r in ratios.items()}}


async def _alternate(ports: dict[str, int], args: argparse.Namespace) -> dict[tuple[str, int, int], Cell]:
    rng = random.Random(0)
    cells = {(n, t, c): Cell([], []) for n in ports for t in args.tokens for c in args.concurrency}
    for port in ports.values():
        await stream_completion(port, _prompt(rng, args.tokens[0]), args.output)
    for turn in range(args.rounds):
        for tokens in args.tokens:
            for concurrency in args.concurrency:
                order = list(ports) if turn % 2 else list(reversed(ports))
                for name in order:
                    prompts = [_prompt(rng, tokens) for _ in range(concurrency)]
                    streams = (stream_completion(ports[name], prompt, args.output) for prompt in prompts)
                    for timeline in await asyncio.gather(*streams):
                        cells[name, tokens, concurrency].ttft_s.append(timeline.ttft_s)
                        cells[name, tokens, concurrency].itl_s += timeline.itl_s
                    await asyncio.sleep(SETTLE_S)
    return cells


# ITL under a prefill load


def _measure_itl(args: argparse.Namespace) -> dict[str, object]:
    apart, together = _start(args, pinned=True)
    with apart, together:
        samples = asyncio.run(_itl_samples({"apart": apart.port, "together": together.port}, args))
    table = Table("cluster", "ITL p50 ms", "p99 ms", "p50 under load", "p99 under load", "p99 ratio")
    ratio = {}
    for name, (calm, loaded) in samples.items():
        p99 = [_p99(values) for values in (calm, loaded)]
        ratio[name] = round(p99[1] / p99[0], 3)
        p50 = [statistics.median(values) for values in (calm, loaded)]
        row = (p50[0], p99[0], p50[1], p99[1])
        table.add(name, *(f"{1e3 * value:.2f}" for value in row), ratio[name])
    table.print()
    return {"itl_p99_ratio": ratio["apart"], "itl_p99_ratio_colocated": ratio["together"]}


async def _itl_samples(ports: dict[str, int], args: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    rng = random.Random(0)
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ports}
    for port in ports.values():
        await _running_streams(port, rng, args)
    for _ in range(3):
        for name, port in ports.items():
            for timeline in await _running_streams(port, rng, args):
                samples[name][0].extend(timeline.itl_s[10:])
            load = asyncio.create_task(_prefill_load(port, rng, args.load_tokens))
            await asyncio.sleep(SETTLE_S)
            for timeline in await _running_streams(port, rng, args):
                samples[name][1].extend(timeline.itl_s[10:])
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
            await asyncio.sleep(SETTLE_S)
    return samples


async def _running_streams(port: int, rng: random.Random, args: argparse.Namespace) -> list[Timeline]:
    streams = (stream_completion(port, _prompt(rng, 32), args.stream_tokens) for _ in range(args.streams))
    return list(await asyncio.gather(*streams))


async def _prefill_load(port: int, rng: random.Random, tokens: int) -> None:
    while True:
        await stream_completion(port, _prompt(rng, tokens), 1)


# What donors give, and what giving costs


@dataclass(slots=True)
class DonorCell:
    """Samples of the prompts of one kind, and of the streams beside them."""

    prompts: list[Timeline] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)

    @property
    def p99_s(self) -> float:
        """Of the inter-token latency."""
        return _p99(self.itl_s)


def _measure_donor(args: argparse.Namespace) -> dict[str, object]:
    config = _config(args)
    of_prompt = -(-(args.load_tokens + args.stream_tokens) // PAGE_SIZE)
    more = replace(config.cache, num_pages=config.cache.num_pages + NUM_GIVEN * of_prompt)
    config = replace(config, cache=more, prefix_cache=True)
    first, second = _cores()
    print("starting 1 prefill + 1 decode worker ...", flush=True)
    workers = [WorkerSpec(Role.PREFILL, "prefill", first, 2 * of_prompt), WorkerSpec(Role.DECODE, "decode", second)]
    with LocalCluster(config, Path(args.model), workers, gateway_cores=first) as cluster:
        cells = asyncio.run(_donor_cells(cluster.port, args))
    table = Table("prompts beside the streams", "TTFT ms", "fetched tokens", "ITL p50 ms", "p99 ms", "p99 ratio")
    calm = cells["none"]
    for name, cell in cells.items():
        ttft = f"{1e3 * statistics.median(prompt.ttft_s for prompt in cell.prompts):.1f}" if cell.prompts else ""
        fetched = statistics.median(prompt.fetched_tokens for prompt in cell.prompts) if cell.prompts else 0
        itl = (1e3 * statistics.median(cell.itl_s), 1e3 * cell.p99_s)
        table.add(name, ttft, fetched, *(f"{value:.2f}" for value in itl), round(cell.p99_s / calm.p99_s, 3))
    table.print()
    computed, fetched = (statistics.median(p.ttft_s for p in cells[kind].prompts) for kind in ("new", "given"))
    return {
        "donor_ttft_ratio": round(fetched / computed, 3),
        "donor_itl_p99_ratio": round(cells["given"].p99_s / calm.p99_s, 3),
    }


async def _donor_cells(port: int, args: argparse.Namespace) -> dict[str, DonorCell]:
    rng = random.Random(0)
    given = itertools.cycle([_prompt(rng, args.load_tokens) for _ in range(NUM_GIVEN)])
    kinds = {"none": None, "new": lambda: _prompt(rng, args.load_tokens), "given": lambda: next(given)}
    cells = {name: DonorCell() for name in kinds}
    for _ in range(2 * NUM_GIVEN):
        await stream_completion(port, next(given), 2)
    await _running_streams(port, rng, args)
    for _ in range(3):
        for name, make in kinds.items():
            load = asyncio.create_task(_prompts(port, make, cells[name].prompts)) if make else None
            await asyncio.sleep(SETTLE_S)
            for timeline in await _running_streams(port, rng, args):
                cells[name].itl_s += timeline.itl_s[10:]
            if load is not None:
                load.cancel()
                await asyncio.gather(load, return_exceptions=True)
            await asyncio.sleep(SETTLE_S)
    return cells


async def _prompts(port: int, make: Callable[[], list[int]], timelines: list[Timeline]) -> None:
    while True:
        timelines.append(await stream_completion(port, make(), 2))


if __name__ == "__main__":
    main()
