"""`baton bench drift`: the share of answers that differ between disaggregated and colocated serving.

Real processes, sockets and gateways; greedy and seeded requests of every kind, several at a time. In fast numerics,
batches of another size may round differently, and where two tokens are almost equally likely that shows. In strict
numerics the share must be 0 (`--numerics strict`). Beside it stands what two runs on one and the same cluster give.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.local_cluster import LocalCluster, WorkerSpec
from benchmarks.mixed_load import Answer, answers, mixed_requests
from benchmarks.table import Table
from engine_core.config import BatchConfig, CacheConfig, EngineConfig, ModelConfig
from engine_core.types import Numerics, Role

DEMO = Path(__file__).parents[1] / "deploy" / "demo_model"
VOCAB = 1000  # token ids are drawn below it; every tokenizer has them
APART = [WorkerSpec(Role.PREFILL, "prefill"), WorkerSpec(Role.DECODE, "decode")]
TOGETHER = [WorkerSpec(Role.DECODE, "colocated")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = _parser().parse_args(argv)
    bodies = mixed_requests(args.requests, VOCAB, max_prompt=args.max_prompt, max_tokens=args.max_tokens)
    config = EngineConfig(
        model=ModelConfig(path=args.model),
        cache=CacheConfig(num_pages=2048),
        batch=BatchConfig(num_slots=max(16, args.concurrency), max_model_len=args.max_prompt + args.max_tokens),
        numerics=Numerics(args.numerics),
    )
    runs: dict[str, list[Answer | None]] = {}
    for name, workers in (("apart", APART), ("together", TOGETHER)):
        print(f"starting {' + '.join(worker.name for worker in workers)} ...", flush=True)
        with LocalCluster(config, Path(args.model), workers) as cluster:
            for again, seed in (("", 0), (" again", 1)):
                runs[name + again] = asyncio.run(answers(cluster.port, "bench", bodies, args.concurrency, seed=seed))
    table = Table("compared", "requests", "greedy that differ", "seeded that differ", "share")
    shares = {}
    for one, other in (("apart", "together"), ("apart", "apart again"), ("together", "together again")):
        pairs = zip(bodies, runs[one], runs[other], strict=True)
        different = [body["temperature"] == 0 for body, a, b in pairs if _tokens(a) != _tokens(b)]
        shares[f"{one} / {other}"] = round(len(different) / len(bodies), 4)
        greedy = sum(different)
        table.add(f"{one} / {other}", len(bodies), greedy, len(different) - greedy, shares[f"{one} / {other}"])
    table.print()
    if args.json:
        print(json.dumps({"numerics": args.numerics, "share_different": shares}))


def _tokens(answer: Answer | None) -> Answer | None:
    """The answer without its log probabilities, whose last bits may differ where no token does."""
    return answer and (*answer[:2], [token for token, _ in answer[2]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton bench drift", description=__doc__)
    parser.add_argument("--model", default=str(DEMO), help="checkpoint directory (default: the demo model)")
    parser.add_argument("--numerics", choices=[str(mode) for mode in Numerics], default="fast")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-prompt", type=int, default=600, help="tokens of the longest prompt")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of the longest answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


if __name__ == "__main__":
    main()
