"""`baton bench router`: what a placement decision costs, and how fast and how small the global index is.

A decision is all of it: hashing the prompt's blocks, matching them, the costs of all pairs, the reservation; on one
core, in this process. Between two decisions block events arrive and are folded, as a gateway does when it has read
what its connections brought. The prompts share prefixes as conversations do, and end in text that nobody has seen.
Times are of the wall clock, with the garbage collector set as a gateway sets it. One seed makes one sequence of
decisions, whatever the machine does meanwhile: it is run `--rounds` times, and beside the percentiles of all times
stand those of each decision's shortest. What differs between the two is the machine's doing; what is left varies from
prompt to prompt.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.table import Table
from engine_core.block_hash import KEY_BYTES, BlockHasher, Keys
from engine_core.compiled_library import COMPILERS
from engine_core.config import EngineConfig
from engine_core.messages import BlockEvents, BlockSnapshot, Load, Measured, PeerAddress, StepSums, WorkerInfo
from engine_core.types import Numerics, Request, Role, SamplingParams, Tier
from router.block_feed import BlockFeed
from router.block_index import BlockIndex
from router.candidate import Candidate
from router.compiled.library import Compiled, open_compiled
from router.cost_model import StepModel, TransferModel, fade
from router.pair_costs import PlacementConfig
from router.placement import JointPlacement, Placement
from router.server import GC_THRESHOLD

VOCAB = 150_000
SHORT_TOKENS, LONG_TOKENS = 8192, 131_072
SHARED_TOKENS = 1024  # of a group of documents: a system prompt
GROUP = 50
HOLDERS = 3  # workers that hold a document, at most
HELD = 256  # placements that are running at any time
STEP_S = 0.01  # of the virtual clock, between two decisions
EVENT_BLOCKS = 64  # of one message
WATCH_DECISIONS = 25  # between two rounds of what a gateway does every 0.25 s
STEPS = [StepSums(1, 2048, 2048 * 1024, 0, 0, 0, 0.05), StepSums(0, 0, 0, 1, 32, 80_000, 0.02)]
ENCODER = msgspec.msgpack.Encoder()
DECODER = msgspec.msgpack.Decoder(BlockEvents | BlockSnapshot | Measured | Load)


@dataclass
class World:
    """Workers, their blocks, and documents to ask about."""

    index: BlockIndex
    placement: JointPlacement
    transfers: TransferModel
    prefill: list[Candidate]
    decode: list[Candidate]
    feeds: list[BlockFeed]
    documents: list[npt.NDArray[np.int32]]
    fresh_keys: np.random.Generator
    now: float = 0.0

    def watch(self, rng: random.Random) -> None:
        """What a gateway does between decisions, every 0.25 s: all workers and many links have been measured."""
        self.index.tick(self.now)
        for worker in self.workers:
            worker.steps.learn(STEPS, self.now)
        for role in (self.prefill, self.decode):
            fade([worker.steps for worker in role], self.now)
        for _ in range(100):
            source, target = rng.choice(self.prefill), rng.choice(self.decode)
            num_bytes = rng.randrange(1 << 28)
            self.transfers.learn(source.key, target.key, num_bytes, 0.001 + num_bytes / 1e10)
        self.transfers.fit(self.now)

    @property
    def workers(self) -> list[Candidate]:
        """Of both roles."""
        return self.prefill + self.decode

    def decide(self, tokens: list[int], number: int) -> Placement:
        """One whole decision."""
        sampling = SamplingParams(max_tokens=256)
        request = Request(f"{number:032x}", tokens, len(tokens), sampling, salt=b"tenant")
        pools = self.prefill, self.decode
        return self.placement.place(request, *pools, now=self.now, avoid=(), session=None, donors=True)


class Times(NamedTuple):
    """Of decisions, in seconds: of every one, and of each the shortest of all rounds."""

    all_s: npt.NDArray[np.float64]
    best_s: npt.NDArray[np.float64]


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="baton bench router", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--workers", type=int, default=64, help="half of them prefill, half decode (default 64)")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="distinct blocks (default 1,000,000)")
    parser.add_argument("--decisions", type=int, default=2000, help="to time (default 2000)")
    parser.add_argument("--size-blocks", type=int, default=10_000_000, help="for bytes per block (default 10,000,000)")
    parser.add_argument("--rounds", type=int, default=3, help="of the same decisions (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    kept = EngineConfig().compile_cache
    parser.add_argument("--compile-cache", default=kept, help=f"of compiled placement (default {kept}; empty: NumPy)")
    arguments = parser.parse_args(argv)
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    directory = Path(arguments.compile_cache).expanduser() / "router"
    compiled = open_compiled(directory, COMPILERS) if arguments.compile_cache else None
    table = Table("page size", "prompt", "p50 ms", "p95 ms", "p99 ms", "best p50 ms", "best p95 ms", "events/s")
    results: dict[int, dict[str, float]] = {}
    for page_size in (128, 16):
        rounds = [_round(arguments, page_size, compiled) for _ in range(arguments.rounds)]
        short, long = (_times([each[kind] for each in rounds]) for kind in ("8k", "128k"))
        events = max(each["events/s"][0] for each in rounds)
        for name, times in (("8k", short), ("128k", long)):
            cells = [f"{_percentile(times.all_s, percent):.3f}" for percent in (50, 95, 99)]
            cells += [f"{_percentile(times.best_s, percent):.3f}" for percent in (50, 95)]
            table.add(page_size, name, *cells, f"{events:,.0f}")
        results[page_size] = {
            "p50_ms": _percentile(short.all_s, 50),
            "p95_ms": _percentile(short.all_s, 95),
            "p95_ms_128k": _percentile(long.all_s, 95),
            "events_per_s": round(events),
            "best_p50_ms": _percentile(short.best_s, 50),
            "best_p95_ms": _percentile(short.best_s, 95),
            "best_p95_ms_128k": _percentile(long.best_s, 95),
        }
    size = _bytes_per_block(arguments.workers, arguments.size_blocks)
    table.print()
    print(f"{size:.1f} bytes per block of resident memory at {arguments.size_blocks:,} blocks")
    if arguments.json:
        print(json.dumps({**results[16], "bytes_per_block": round(size, 1), "page_128": results[128]}))
    return 0


def _round(arguments: argparse.Namespace, page_size: int, compiled: Compiled | None) -> dict[str, list[float]]:
    """Seconds of each decision by length of the prompt, and events per second."""
    world = _build(arguments.workers, arguments.blocks, page_size, arguments.seed, compiled)
    short = _time_decisions(world, SHORT_TOKENS, arguments.decisions, arguments.seed)
    long = _time_decisions(world, LONG_TOKENS, arguments.decisions // 8, arguments.seed)
    return {"8k": short, "128k": long, "events/s": [_time_events(world)]}


def _times(rounds: Sequence[list[float]]) -> Times:
    by_round = np.array(rounds)
    return Times(by_round.reshape(-1), by_round.min(axis=0))


def _build(num_workers: int, num_blocks: int, page_size: int, seed: int, compiled: Compiled | None) -> World:
    rng = random.Random(seed)
    nprng = np.random.default_rng(seed)
    index = BlockIndex(num_blocks, compiled)
    transfers = TransferModel()
    candidates = [_candidate(i, Role.PREFILL if i % 2 else Role.DECODE, page_size) for i in range(num_workers)]
    feeds = [BlockFeed(index, candidate.key) for candidate in candidates]
    documents = _documents(nprng, num_blocks * page_size)
    hasher = BlockHasher(page_size, b"tenant", bytes.fromhex(candidates[0].info.block_namespace))
    held: list[list[Keys]] = [[] for _ in candidates]
    num_known = 0
    for document in documents:
        keys = hasher.keys(document)
        num_known += len(keys)
        for worker in rng.sample(range(num_workers), rng.randint(1, HOLDERS)):
            held[worker].append(keys)
        if num_known >= num_blocks * 1.2:  # shared prefixes are counted more than once
            break
    for feed, candidate, keys_of in zip(feeds, candidates, held, strict=True):
        question = feed.connected(0.0)
        stored = np.concatenate(keys_of) if keys_of else np.zeros(0, np.uint64)
        snapshot = BlockSnapshot(*candidate.key, question.number, 0, 1, 0, Tier.DEVICE, stored.tobytes())
        feed.on_snapshot(snapshot, 0.0)
    return World(
        index=index,
        placement=JointPlacement(index, transfers, PlacementConfig(), compiled),
        transfers=transfers,
        prefill=[candidate for candidate in candidates if candidate.info.role is Role.PREFILL],
        decode=[candidate for candidate in candidates if candidate.info.role is Role.DECODE],
        feeds=feeds,
        documents=documents,
        fresh_keys=nprng,
    )


def _candidate(index: int, role: Role, page_size: int) -> Candidate:
    info = WorkerInfo(
        worker_id=f"{role}-{index}",
        incarnation=1,
        role=role,
        address=PeerAddress("127.0.0.1", index, index),
        fingerprint="bench",
        numerics=Numerics.FAST,
        num_slots=64,
        num_pages=1_000_000,
        page_size=page_size,
        max_model_len=LONG_TOKENS + 4096,
        chunk_tokens=2048,
        block_bytes=page_size * 131_072,
        block_namespace="be" * 16,
    )
    candidate = Candidate(info, StepModel(None))
    candidate.connected = candidate.usable = True
    candidate.steps.learn(STEPS * 10, 0.0)
    return candidate


def _documents(rng: np.random.Generator, num_tokens: int) -> list[npt.NDArray[np.int32]]:
    """Long ones for long prompts, the rest as long as a short prompt; a group shares its first tokens."""
    documents = []
    lengths = [LONG_TOKENS] * 4 + [SHORT_TOKENS] * (int(1.3 * num_tokens) // SHORT_TOKENS)
    for number, length in enumerate(lengths):
        if number % GROUP == 0:
            shared = rng.integers(0, VOCAB, SHARED_TOKENS, np.int32)
        documents.append(np.concatenate((shared, rng.integers(0, VOCAB, length - SHARED_TOKENS, np.int32))))
    return documents


def _time_decisions(world: World, num_tokens: int, count: int, seed: int) -> list[float]:
    """Seconds of each of `count` decisions, after a tenth as many that are not counted."""
    rng = random.Random(seed)
    fitting = [document for document in world.documents if len(document) == num_tokens]
    running: list[Placement] = []
    times: list[float] = []
    for number, tokens in enumerate(_prompts(rng, world.fresh_keys, fitting, num_tokens, count + count // 10)):
        _events_between(world, rng)
        world.index.fold()
        start = time.perf_counter()
        placement = world.decide(tokens, number)
        if number >= count // 10:
            times.append(time.perf_counter() - start)
        running.append(placement)
        if len(running) > HELD:
            running.pop(rng.randrange(len(running))).release(world.now)
        world.now += STEP_S
        if number % WATCH_DECISIONS == 0:
            world.watch(rng)
    for placement in running:
        placement.release(world.now)
    return times


def _prompts(
    rng: random.Random, fresh: np.random.Generator, documents: Sequence[npt.NDArray[np.int32]], length: int, count: int
) -> Iterator[list[int]]:
    """Each begins as a document does and goes on with something new."""
    for _ in range(count):
        document = rng.choice(documents)
        known = rng.randint(0, length)
        yield [*document[:known].tolist(), *fresh.integers(0, VOCAB, length - known).tolist()]


def _events_between(world: World, rng: random.Random) -> None:
    """Some workers report new blocks, and others that are gone."""
    for number in rng.sample(range(len(world.feeds)), 4):
        world.feeds[number].on_events(_event(world, number), world.now)


def _event(world: World, number: int) -> BlockEvents:
    keys = world.fresh_keys.integers(1, 2**64, EVENT_BLOCKS, np.uint64).tobytes()
    half = len(keys) // 2 // KEY_BYTES * KEY_BYTES
    feed, key = world.feeds[number], world.feeds[number].worker
    return BlockEvents(*key, feed.sequence + 1, Tier.DEVICE, False, keys[:half], keys[half:])


def _time_events(world: World) -> float:
    """Block events per second, from msgpack to the table: each stored, and later removed."""
    messages = []
    num_events = 0
    for round_index in range(40):
        for feed in world.feeds:
            stored = world.fresh_keys.integers(1, 2**64, EVENT_BLOCKS, np.uint64).tobytes()
            for step, (gone, come) in enumerate(((b"", stored), (stored, b""))):
                sequence = feed.sequence + 1 + 2 * round_index + step
                messages.append(ENCODER.encode(BlockEvents(*feed.worker, sequence, Tier.DEVICE, False, gone, come)))
                num_events += EVENT_BLOCKS
    feed_of = {feed.worker: feed for feed in world.feeds}
    start = time.perf_counter()
    for encoded in messages:
        message = DECODER.decode(encoded)
        feed_of[message.worker_id, message.incarnation].on_events(message, world.now)
    len(world.index)  # folds what waits
    return num_events / (time.perf_counter() - start)


def _bytes_per_block(num_workers: int, num_blocks: int) -> float:
    """Resident memory of an index that grew to this size; the keys themselves are not kept."""
    before = _resident_bytes()
    rng = np.random.default_rng(1)
    index = BlockIndex(100_000, None)
    for worker in range(num_workers):
        index.join(worker)
    none = np.zeros(0, np.uint64)
    batch = 8192
    for start in range(0, num_blocks, batch):
        keys = rng.integers(1, 2**64, min(batch, num_blocks - start), np.uint64)
        index.change(rng.integers(num_workers).item(), Tier.DEVICE, none, keys)
    while index.is_moving:
        index.tick(0.0)
    index.predict(0, rng.integers(1, 2**64, 100_000, np.uint64))
    size = max(_resident_bytes() - before, index.num_bytes) / len(index)
    return size


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * 4096


def _percentile(seconds: npt.NDArray[np.float64], percent: float) -> float:
    return round(1000 * float(np.percentile(seconds, percent)), 3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
