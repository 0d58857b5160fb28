"""`baton bench gap`: host time between consecutive decode steps in which the device has no work queued.

A step's gap ends when its dispatch returns. It began when the step before was complete; if that one was still running
when the dispatch returned, the device always had work and the gap is exactly 0. Completion is seen by a thread that
waits on each step's output, so with overlap off the gap is the whole host round trip.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.table import Table
from decode_worker.scheduler import DecodeScheduler
from engine_core.config import BatchConfig, CacheConfig, EngineConfig, ModelConfig
from engine_core.engine import PendingStep
from engine_core.replica import Replica
from engine_core.replica_loader import open_replica
from engine_core.step_io import StepInputs
from engine_core.types import Request, SamplingParams

PROMPT = 32


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = _parser().parse_args(argv)
    replica = _open(args)
    table = Table("overlap", "batch", "gap median us", "gap p95 us", "steps without idle", "step ms")
    results: dict[bool, dict[int, Gaps]] = {True: {}, False: {}}
    for overlap in (True, False):
        for batch in args.batches:
            gaps = measure(replica, batch, args.steps, overlap=overlap)
            results[overlap][batch] = gaps
            table.add(
                "on" if overlap else "off",
                batch,
                f"{gaps.median_us:.1f}",
                f"{gaps.p95_us:.1f}",
                f"{gaps.busy_share:.1%}",
                f"{gaps.step_ms:.2f}",
            )
    table.print()
    if args.json:
        on, off = results[True], results[False]
        print(
            json.dumps(
                {
                    "median_us": {str(b): round(g.median_us, 1) for b, g in on.items()},
                    "busy_share": {str(b): round(g.busy_share, 4) for b, g in on.items()},
                    "median_us_overlap_off": {str(b): round(g.median_us, 1) for b, g in off.items()},
                }
            )
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton bench gap", description=__doc__)
    parser.add_argument("--model", default="", help="checkpoint directory (default: the demo model)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=400, help="decode steps measured per batch")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _open(args: argparse.Namespace) -> Replica:
    model = Path(args.model) if args.model else Path(__file__).parents[1] / "deploy" / "demo_model"
    length = PROMPT + args.steps + 32
    config = EngineConfig(
        model=ModelConfig(path=str(model), dtype=args.dtype),
        cache=CacheConfig(num_pages=(-(-length // 16) + 1) * max(args.batches)),
        batch=BatchConfig(num_slots=max(args.batches), max_model_len=length, prefill_tokens=128),
        prefix_cache=False,
    )
    return open_replica(config, model, lambda _: None, decodes=True)


@dataclass(frozen=True, slots=True)
class Gaps:
    """Idle time of the device between consecutive decode steps."""

    median_us: float
    p95_us: float
    busy_share: float
    step_ms: float


def measure(replica: Replica, batch: int, steps: int, *, overlap: bool) -> Gaps:
    """Decode `steps` steps of `batch` greedy sequences through the real scheduler."""
    engine: Any = _TimedEngine(replica.engine)
    scheduler = DecodeScheduler(replace(replica, engine=engine), _Silent(), overlap=overlap)
    sampling = SamplingParams(temperature=0.0, max_tokens=steps + 8, ignore_eos=True)
    for i in range(batch):
        tokens = [(i * 7919 + j * 104729) % 1000 for j in range(PROMPT)]
        scheduler.add(Request(f"gap-{i}", tokens, PROMPT, sampling), None)
    while scheduler.tick():
        pass
    gaps: Gaps = engine.gaps(batch, replica.resolved.decode_bucket(batch))
    return gaps


class _Silent:
    """Events that go nowhere."""

    def reserved(self, *_: Any) -> None:
        """Nothing lands here."""

    def tokens(self, *_: Any) -> None:
        """Nobody reads the tokens."""

    def failed(self, key: Any, error: Exception) -> None:
        """A benchmark that loses a request is wrong."""
        raise error


class _TimedEngine:
    """An engine that notes when each full decode step was dispatched and when it was complete."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._dispatched: list[tuple[int, float, bool]] = []  # rows, seconds when dispatch returned, device had work
        self._completed: list[float] = []
        self._last: PendingStep | None = None
        self._queue: SimpleQueue[PendingStep | None] = SimpleQueue()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def dispatch(self, inputs: StepInputs) -> PendingStep:
        """As the engine's, with a stamp behind it."""
        step: PendingStep = self._engine.dispatch(inputs)
        had_work = self._last is not None and not self._last.is_ready()
        rows = inputs.kv_lens.shape[0] if inputs.tokens.shape == inputs.kv_lens.shape else 0
        self._dispatched.append((rows, time.perf_counter(), had_work))
        self._queue.put(step)
        self._last = step
        return step

    def gaps(self, batch: int, bucket: int) -> Gaps:
        """Statistics over the decode steps at full batch, the first and last few left out."""
        self._queue.put(None)
        self._watcher.join()
        steps = [i for i in range(1, len(self._dispatched)) if self._is_steady(i, bucket)][4:-4]
        gaps = [self._gap_s(i) * 1e6 for i in steps]
        times = [self._completed[i] - self._completed[i - 1] for i in steps]
        return Gaps(
            median_us=statistics.median(gaps),
            p95_us=statistics.quantiles(gaps, n=20)[-1],
            busy_share=sum(self._dispatched[i][2] for i in steps) / len(steps),
            step_ms=statistics.median(times) * 1e3,
        )

    def _is_steady(self, i: int, bucket: int) -> bool:
        return self._dispatched[i][0] == bucket == self._dispatched[i - 1][0]

    def _gap_s(self, i: int) -> float:
        _, returned, had_work = self._dispatched[i]
        return 0.0 if had_work else max(0.0, returned - self._completed[i - 1])

    def _watch(self) -> None:
        while (step := self._queue.get()) is not None:
            step.output.tokens.block_until_ready()
            self._completed.append(time.perf_counter())


if __name__ == "__main__":
    main()
