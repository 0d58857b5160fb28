"""`baton bench engine`: decode and prefill tokens/s against Hugging Face transformers on the same weights, in one run.

Both engines live in processes of their own and are measured in turn, round by round, so that a drift of the machine
hits both. Reported is the median over rounds of each round's best step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, write_random_checkpoint
from benchmarks.table import Table

CONTEXT = 32  # tokens in the cache when decoding starts
PROMPT = 512  # tokens of the prefill measurement


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(args.model) if args.model else write_random_checkpoint(Path(scratch), SHAPES[args.shape])
        results = {dtype: _compare(model, dtype, args) for dtype in args.dtypes}
    _print(results, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton bench engine", description=__doc__)
    parser.add_argument("--model", help="checkpoint directory (default: random weights of --shape)")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b", help="shape of the random weights")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=6, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each measuring both engines")
    parser.add_argument("--no-peer", action="store_true", help="measure Baton alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


Measured = dict[str, dict[str, float]]  # engine -> measurement -> tokens/s


def _compare(model: Path, dtype: str, args: argparse.Namespace) -> Measured:
    names = ["baton"] if args.no_peer else ["baton", "transformers"]
    peers = {name: _Peer(name, model, dtype, max(args.batches)) for name in names}
    jobs = [("decode", batch) for batch in args.batches] + [("prefill", PROMPT)]
    samples: dict[str, dict[str, list[float]]] = {name: {f"{k}_{n}": [] for k, n in jobs} for name in names}
    try:
        for _ in range(args.rounds):
            for kind, size in jobs:
                for name, peer in peers.items():
                    samples[name][f"{kind}_{size}"].append(peer.measure(kind, size, args.steps))
    finally:
        for peer in peers.values():
            peer.close()
    return {name: {job: statistics.median(values) for job, values in jobs.items()} for name, jobs in samples.items()}


def _print(results: dict[str, Measured], args: argparse.Namespace) -> None:
    table = Table("dtype", "measurement", "baton tok/s", "transformers tok/s", "ratio")
    decode_ratio: dict[str, dict[str, float]] = {}
    prefill_ratio: dict[str, float] = {}
    for dtype, measured in results.items():
        for job, ours in measured["baton"].items():
            theirs = measured.get("transformers", {}).get(job)
            ratio = round(ours / theirs, 3) if theirs else None
            table.add(dtype, job.replace("_", " "), f"{ours:.1f}", f"{theirs:.1f}" if theirs else "-", ratio or "-")
            if ratio is not None and job.startswith("decode"):
                decode_ratio.setdefault(dtype, {})[job.removeprefix("decode_")] = ratio
            elif ratio is not None:
                prefill_ratio[dtype] = ratio
    table.print()
    if args.json:
        tokens_per_s = {dtype: dict(measured) for dtype, measured in results.items()}
        print(json.dumps({"decode_ratio": decode_ratio, "prefill_ratio": prefill_ratio, "tokens_per_s": tokens_per_s}))


class _Peer:
    """An engine in a process of its own, measured on request."""

    def __init__(self, name: str, model: Path, dtype: str, max_batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        target = _serve_baton if name == "baton" else _serve_transformers
        self._process = context.Process(target=target, args=(theirs, str(model), dtype, max_batch), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.recv() == "ready"

    def measure(self, kind: str, size: int, steps: int) -> float:
        """Tokens/s of the best step."""
        self._pipe.send((kind, size, steps))
        return float(self._pipe.recv())

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(30)


def _answer(pipe: Connection, measures: dict[str, Callable[[int, int], float]]) -> None:
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        kind, size, steps = job
        pipe.send(measures[kind](size, steps))


def _serve_baton(pipe: Connection, model: str, dtype: str, max_batch: int) -> None:
    from benchmarks.replica_probe import ReplicaProbe  # noqa: PLC0415  this process alone imports jax

    probe = ReplicaProbe(Path(model), dtype, max_batch, PROMPT, CONTEXT)
    _answer(pipe, {"decode": probe.decode, "prefill": lambda size, steps: probe.prefill(size, 3)})


def _serve_transformers(pipe: Connection, model: str, dtype: str, max_batch: int) -> None:
    from benchmarks.transformers_probe import TransformersProbe  # noqa: PLC0415  this process alone imports torch

    probe: Any = TransformersProbe(Path(model), dtype, CONTEXT)
    _answer(pipe, {"decode": probe.decode, "prefill": lambda size, steps: probe.prefill(size, 3)})


if __name__ == "__main__":
    main()
