"""`baton bench engine`: decode and prefill tokens/s against Hugging Face transformers on the same weights, in one run.

llama.cpp is a second peer where llama-cpp-python and gguf are installed. Each engine lives in a process of its own, and
they are measured in turn, round by round, so that a drift of the machine hits all. Reported is the median over rounds
of each round's best step.
"""

from __future__ import annotations

import argparse
import importlib.util
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
PEERS = {"transformers": ("transformers", "torch"), "llama.cpp": ("llama_cpp", "gguf")}  # and the packages they need
XLA_ONLY = "baton-xla"  # Baton without its compiled kernels for CPUs


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(args.model) if args.model else write_random_checkpoint(Path(scratch), SHAPES[args.shape])
        results = {dtype: _compare(model, dtype, Path(scratch), args) for dtype in args.dtypes}
    _print(results, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton bench engine", description=__doc__)
    parser.add_argument("--model", help="checkpoint directory (default: random weights of --shape)")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b", help="shape of the random weights")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=6, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each measuring every engine")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=[peer for peer, packages in PEERS.items() if all(map(importlib.util.find_spec, packages))],
        choices=[*PEERS, XLA_ONLY],
        help=f"measured beside Baton (default: those installed); with none named, Baton alone; {XLA_ONLY} is Baton "
        "without compiled kernels (--model.cpu_kernels xla)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


Measured = dict[str, dict[str, float]]  # engine -> measurement -> tokens/s


def _compare(model: Path, dtype: str, scratch: Path, args: argparse.Namespace) -> Measured:
    names = ["baton", *args.peers]
    peers = {name: _Engine(name, model, dtype, max(args.batches), scratch) for name in names}
    jobs = [("decode", batch) for batch in args.batches] + [("prefill", PROMPT)]
    samples: dict[str, dict[str, list[float]]] = {name: {f"{k}_{n}": [] for k, n in jobs} for name in names}
    try:
        for turn in range(args.rounds):
            print(f"{dtype}: round {turn + 1} of {args.rounds} ...", flush=True)
            for kind, size in jobs:
                for name, peer in peers.items():
                    samples[name][f"{kind}_{size}"].append(peer.measure(kind, size, args.steps))
    finally:
        for peer in peers.values():
            peer.close()
    return {name: {job: statistics.median(values) for job, values in jobs.items()} for name, jobs in samples.items()}


def _print(results: dict[str, Measured], args: argparse.Namespace) -> None:
    columns = [title for peer in args.peers for title in (f"{peer} tok/s", f"of {peer}")]
    table = Table("dtype", "measurement", "baton tok/s", *columns)
    decode_ratio: dict[str, dict[str, float]] = {}
    prefill_ratio: dict[str, float] = {}
    for dtype, measured in results.items():
        for job, ours in measured["baton"].items():
            theirs = {peer: measured[peer][job] for peer in args.peers}
            cells = [cell for speed in theirs.values() for cell in (f"{speed:.1f}", f"{ours / speed:.2f}")]
            table.add(dtype, job.replace("_", " "), f"{ours:.1f}", *cells)
            if "transformers" not in theirs:
                continue
            ratio = round(ours / theirs["transformers"], 3)
            if job.startswith("decode"):
                decode_ratio.setdefault(dtype, {})[job.removeprefix("decode_")] = ratio
            else:
                prefill_ratio[dtype] = ratio
    table.print()
    if args.json:
        print(json.dumps({"decode_ratio": decode_ratio, "prefill_ratio": prefill_ratio, "tokens_per_s": results}))


class _Engine:
    """An engine in a process of its own, measured on request."""

    def __init__(self, name: str, model: Path, dtype: str, max_batch: int, scratch: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        targets = {"baton": _serve_baton, XLA_ONLY: _serve_xla_only, "transformers": _serve_transformers}
        target = targets.get(name, _serve_llama_cpp)
        self._process = context.Process(target=target, args=(theirs, model, dtype, max_batch, scratch), daemon=True)
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


def _serve_baton(pipe: Connection, model: Path, dtype: str, max_batch: int, scratch: Path) -> None:
    del scratch
    _serve_replica(pipe, model, dtype, max_batch, "auto")


def _serve_xla_only(pipe: Connection, model: Path, dtype: str, max_batch: int, scratch: Path) -> None:
    del scratch
    _serve_replica(pipe, model, dtype, max_batch, "xla")


def _serve_replica(pipe: Connection, model: Path, dtype: str, max_batch: int, cpu_kernels: str) -> None:
    from benchmarks.replica_probe import ReplicaProbe  # noqa: PLC0415  this process alone imports jax

    probe = ReplicaProbe(model, dtype, max_batch, PROMPT, CONTEXT, cpu_kernels)
    _answer(pipe, {"decode": probe.decode, "prefill": lambda size, steps: probe.prefill(size, 3)})


def _serve_transformers(pipe: Connection, model: Path, dtype: str, max_batch: int, scratch: Path) -> None:
    from benchmarks.transformers_probe import TransformersProbe  # noqa: PLC0415  this process alone imports torch

    del max_batch, scratch
    probe: Any = TransformersProbe(model, dtype, CONTEXT)
    _answer(pipe, {"decode": probe.decode, "prefill": lambda size, steps: probe.prefill(size, 3)})


def _serve_llama_cpp(pipe: Connection, model: Path, dtype: str, max_batch: int, scratch: Path) -> None:
    from benchmarks.llama_cpp_probe import LlamaCppProbe  # noqa: PLC0415  optional packages

    probe: Any = LlamaCppProbe(model, dtype, max_batch, PROMPT, CONTEXT, scratch)
    _answer(pipe, {"decode": probe.decode, "prefill": lambda size, steps: probe.prefill(size, 3)})


if __name__ == "__main__":
    main()
