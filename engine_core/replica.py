"""One model replica: the engine and the host-side state around it. `replica_loader` opens one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine_core.batch import Batch, BatchBuilder, Chunk
from engine_core.engine import Engine, PendingStep
from engine_core.messages import PeerAddress, WorkerInfo
from engine_core.prefix_cache import BlockEvent
from engine_core.resolve import ResolvedEngine
from engine_core.sequence import Sequence as Seq
from engine_core.sequence_memory import BlockUnion, SequenceMemory
from engine_core.types import Numerics, Role
from engine_core.worker_stats import StatsRecorder


@dataclass(frozen=True, slots=True)
class Replica:
    """What a scheduler works with.

    Attributes:
        blocks: what others are told of the prefix caches.
        identity: names the weights and, in strict numerics, the bits they give; replicas that differ never pair.
    """

    engine: Engine
    memory: SequenceMemory
    blocks: BlockUnion
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
        return self.memory.free_pages

    @property
    def compiles_after_warmup(self) -> int:
        """Must stay 0."""
        return self.engine.compiles_after_warmup

    def drain_block_events(self) -> list[BlockEvent]:
        """How the prefix cache changed since the last call."""
        return self.blocks.drain_events()

    def block_hashes(self) -> list[bytes]:
        """What the prefix cache holds."""
        return self.blocks.hashes()

    @property
    def prefill_budget(self) -> tuple[int, int, int]:
        """Of one prefill step at most: tokens and sequences of each row shard, and tokens of one sequence."""
        resolved = self.resolved
        if resolved.numerics is Numerics.STRICT:
            return (resolved.decode_buckets[0],) * 3
        return resolved.prefill_buckets[-1], resolved.prefill_rows, resolved.prefill_buckets[-1]

    @property
    def scoring_budget(self) -> tuple[int, int, int]:
        """The same for `dispatch_scoring`."""
        rows = self.resolved.decode_buckets[-1]
        return rows, rows, min(rows, self.resolved.scored_tokens)

    def dispatch_prefill(self, chunks: Sequence[Chunk]) -> tuple[PendingStep, list[int]]:
        """Queue one prefill step; and the row of its output that holds each chunk's sampled token."""
        resolved = self.resolved
        if resolved.numerics is Numerics.STRICT:
            return self.dispatch_scoring(chunks)
        bucket = resolved.prefill_bucket(_fullest((chunk.sequence.shard, chunk.count) for chunk in chunks))
        return self._dispatch_chunks(chunks, self.builder.prefill(chunks, bucket, resolved.prefill_rows))

    def dispatch_scoring(self, chunks: Sequence[Chunk]) -> tuple[PendingStep, list[int]]:
        """Queue one prefill step with a row of output for each token; and the last row of each chunk."""
        bucket = self.resolved.decode_bucket(_fullest((chunk.sequence.shard, chunk.count) for chunk in chunks))
        return self._dispatch_chunks(chunks, self.builder.row_prefill(chunks, bucket))

    def _dispatch_chunks(self, chunks: Sequence[Chunk], batch: Batch) -> tuple[PendingStep, list[int]]:
        self.stats.prefill_step(sum(chunk.count for chunk in chunks), len(batch.inputs.tokens))
        return self.engine.dispatch(batch.inputs), batch.rows

    def dispatch_decode(self, sequences: Sequence[Seq]) -> tuple[PendingStep, list[int]]:
        """Queue one decode step; and the row of its output that holds each sequence's token."""
        batch = self.builder.decode(sequences, self.resolved.decode_bucket(_fullest((s.shard, 1) for s in sequences)))
        self.stats.decode_step(len(sequences), len(batch.inputs.tokens))
        return self.engine.dispatch(batch.inputs), batch.rows

    def prepare_slot(self, sequence: Seq) -> None:
        """Set token counts on the device where the request uses penalties. The sequence has a slot."""
        request = sequence.request
        if request.sampling.has_penalties:
            prompt = sequence.token_ids[: request.num_prompt_tokens]
            slot = sequence.shard * self.memory.shards[0].table.num_slots + sequence.slot
            self.engine.init_slot(slot, prompt, sequence.token_ids[request.num_prompt_tokens :])

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


def _fullest(rows: Iterable[tuple[int, int]]) -> int:
    """Rows of the row shard that has most, of (shard, count) pairs."""
    counts: Counter[int] = Counter()
    for shard, count in rows:
        counts[shard] += count
    return max(counts.values(), default=0)
