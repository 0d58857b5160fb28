"""One model replica: the engine and the host-side state around it. `replica_loader` opens one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from engine_core.batch import BatchBuilder, Chunk
from engine_core.chunking import SequenceMemory
from engine_core.engine import Engine, PendingStep
from engine_core.messages import PeerAddress, WorkerInfo
from engine_core.prefix_cache import BlockEvent
from engine_core.resolve import ResolvedEngine
from engine_core.sequence import Sequence as Seq
from engine_core.types import Numerics, Role
from engine_core.worker_stats import StatsRecorder


@dataclass(frozen=True, slots=True)
class Replica:
    """What a scheduler works with.

    Attributes:
        identity: names the weights and, in strict numerics, the bits they give; replicas that differ never pair.
    """

    engine: Engine
    memory: SequenceMemory
    builder: BatchBuilder
    identity: str
    stats: StatsRecorder

    @property
    def resolved(self) -> ResolvedEngine:
        """Sizes of this replica."""
        return self.engine.resolved

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.resolved.spec.vocab_size

    @property
    def max_model_len(self) -> int:
        """Prompt plus answer, tokens at most."""
        return self.resolved.max_model_len

    @property
    def free_pages(self) -> int:
        """Pages that can be had, free or evictable."""
        return self.memory.cache.num_available

    @property
    def compiles_after_warmup(self) -> int:
        """Must stay 0."""
        return self.engine.compiles_after_warmup

    def drain_block_events(self) -> list[BlockEvent]:
        """How the prefix cache changed since the last call."""
        return self.memory.cache.drain_events()

    def block_hashes(self) -> list[bytes]:
        """What the prefix cache holds."""
        return self.memory.cache.hashes()

    @property
    def prefill_budget(self) -> tuple[int, int, int]:
        """Of one prefill step at most: tokens, sequences, tokens of one sequence."""
        resolved = self.resolved
        if resolved.numerics is Numerics.STRICT:
            return (resolved.decode_buckets[0],) * 3
        return resolved.prefill_buckets[-1], resolved.prefill_rows, resolved.prefill_buckets[-1]

    @property
    def scoring_budget(self) -> tuple[int, int, int]:
        """The same for `dispatch_scoring`."""
        rows = self.resolved.decode_buckets[-1]
        return rows, rows, min(rows, self.resolved.scored_tokens)

    def dispatch_prefill(self, chunks: Sequence[Chunk]) -> PendingStep:
        """Queue one prefill step. Row i of its output belongs to `output_rows(chunks)[i]`."""
        if self.resolved.numerics is Numerics.STRICT:
            return self.dispatch_scoring(chunks)
        count = sum(chunk.count for chunk in chunks)
        bucket = self.resolved.prefill_bucket(count)
        self.stats.prefill_step(count, bucket)
        return self.engine.dispatch(self.builder.prefill(chunks, bucket, self.resolved.prefill_rows))

    def output_rows(self, chunks: Sequence[Chunk]) -> list[int]:
        """Row of the step's output that holds each chunk's sampled token."""
        if self.resolved.numerics is not Numerics.STRICT:
            return list(range(len(chunks)))
        return last_rows(chunks)

    def dispatch_scoring(self, chunks: Sequence[Chunk]) -> PendingStep:
        """Queue one prefill step with an output row for each token, those of a chunk up to `last_rows(chunks)[i]`."""
        count = sum(chunk.count for chunk in chunks)
        bucket = self.resolved.decode_bucket(count)
        self.stats.prefill_step(count, bucket)
        return self.engine.dispatch(self.builder.row_prefill(chunks, bucket))

    def dispatch_decode(self, sequences: Sequence[Seq]) -> PendingStep:
        """Queue one decode step; row i is `sequences[i]`."""
        bucket = self.resolved.decode_bucket(len(sequences))
        self.stats.decode_step(len(sequences), bucket)
        return self.engine.dispatch(self.builder.decode(sequences, bucket))

    def prepare_slot(self, sequence: Seq) -> None:
        """Set token counts on the device where the request uses penalties. The sequence has a slot."""
        request = sequence.request
        if request.sampling.has_penalties:
            prompt = sequence.token_ids[: request.num_prompt_tokens]
            self.engine.init_slot(sequence.slot, prompt, sequence.token_ids[request.num_prompt_tokens :])

    def worker_info(
        self, role: Role, worker_id: str, incarnation: int, address: PeerAddress, fingerprint: str
    ) -> WorkerInfo:
        """What gateways and the fleet know of a worker with this replica."""
        resolved = self.resolved
        return WorkerInfo(
            worker_id=worker_id,
            incarnation=incarnation,
            role=role,
            address=address,
            fingerprint=fingerprint,
            numerics=resolved.numerics,
            num_slots=resolved.num_slots,
            num_pages=resolved.layout.num_pages,
            page_size=resolved.layout.page_size,
            max_model_len=resolved.max_model_len,
            chunk_tokens=self.prefill_budget[0],
            block_bytes=resolved.layout.block_bytes,
            block_namespace=self.memory.block_namespace.hex(),
        )


def last_rows(chunks: Sequence[Chunk]) -> list[int]:
    """Each chunk's last row, where every token has one."""
    return [end - 1 for end in itertools.accumulate(chunk.count for chunk in chunks)]
