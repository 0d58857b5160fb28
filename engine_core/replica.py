"""One model replica: the engine and the host-side state around it, opened, warmed up and, in strict mode, proved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from engine_core.batch import BatchBuilder, Chunk
from engine_core.chunking import SequenceMemory
from engine_core.config import EngineConfig
from engine_core.engine import Engine, PendingStep
from engine_core.models.registry import load_spec
from engine_core.page_pool import PagePool
from engine_core.prefix_cache import PrefixCache
from engine_core.messages import PeerAddress, WorkerInfo
from engine_core.resolve import ResolvedEngine, checkpoint_identity, resolve
from engine_core.sequence import Sequence as Seq
from engine_core.slot_table import SlotTable
from engine_core.step_io import StepInputs
from engine_core.types import Numerics, Role


@dataclass(frozen=True, slots=True)
class Replica:
    """What a scheduler works with."""

    engine: Engine
    memory: SequenceMemory
    builder: BatchBuilder
    config: EngineConfig

    @property
    def resolved(self) -> ResolvedEngine:
        """Sizes of this replica."""
        return self.engine.resolved

    @property
    def prefill_budget(self) -> tuple[int, int]:
        """Tokens and sequences of one prefill step at most."""
        resolved = self.resolved
        if resolved.numerics is Numerics.STRICT:
            return resolved.decode_buckets[0], resolved.decode_buckets[0]
        return resolved.prefill_buckets[-1], resolved.prefill_rows

    def dispatch_prefill(self, chunks: Sequence[Chunk]) -> PendingStep:
        """Queue one prefill step. Row i of its output belongs to `output_rows(chunks)[i]`."""
        return self.engine.dispatch(self._prefill_inputs(chunks))

    def output_rows(self, chunks: Sequence[Chunk]) -> list[int]:
        """Row of the step's output that holds each chunk's sampled token."""
        if self.resolved.numerics is not Numerics.STRICT:
            return list(range(len(chunks)))
        rows, end = [], 0
        for chunk in chunks:
            end += chunk.count
            rows.append(end - 1)
        return rows

    def dispatch_decode(self, sequences: Sequence[Seq]) -> PendingStep:
        """Queue one decode step; row i is `sequences[i]`."""
        return self.engine.dispatch(self.builder.decode(sequences, self.resolved.decode_bucket(len(sequences))))

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
        )

    def _prefill_inputs(self, chunks: Sequence[Chunk]) -> StepInputs:
        resolved = self.resolved
        if resolved.numerics is Numerics.STRICT:
            return self.builder.strict_prefill(chunks, resolved.decode_buckets[0])
        bucket = resolved.prefill_bucket(sum(chunk.count for chunk in chunks))
        return self.builder.prefill(chunks, bucket, resolved.prefill_rows)


def open_replica(
    config: EngineConfig, model_dir: Path, progress: Callable[[str], None], *, decodes: bool
) -> Replica:
    """Load a checkpoint and compile every bucket.

    Args:
        config: what the user asked for.
        model_dir: the checkpoint.
        progress: told short sentences on the way.
        decodes: compile the decode buckets; prefill workers have no use for them.

    Raises:
        ConfigError, CheckpointError: it cannot work.
    """
    use_compile_cache(config.compile_cache)
    progress("reading the checkpoint")
    resolved = resolve(config, load_spec(model_dir), checkpoint_identity(model_dir), jax.local_devices())
    engine = Engine(config, resolved, model_dir, progress)
    table = SlotTable(
        resolved.num_slots, resolved.pages_per_seq, resolved.layout.num_pages, resolved.spec.vocab_size
    )
    cache = PrefixCache(PagePool(resolved.layout.num_pages), resolved.layout.page_size)
    namespace = bytes.fromhex(resolved.fingerprint)
    memory = SequenceMemory(cache, table, resolved.layout.page_size, namespace, reuse=config.prefix_cache)
    replica = Replica(engine=engine, memory=memory, builder=BatchBuilder(table), config=config)
    engine.warm_up(_buckets(replica, decodes=decodes), progress)
    return replica


def use_compile_cache(path: str) -> None:
    """Switch on JAX's persistent compilation cache, for small programs too. An empty path leaves it off."""
    if not path:
        return
    directory = Path(path).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _buckets(replica: Replica, *, decodes: bool) -> list[tuple[str, StepInputs]]:
    resolved = replica.resolved
    builder = replica.builder
    buckets = [
        (f"prefill of {size} tokens", builder.prefill((), size, resolved.prefill_rows))
        for size in resolved.prefill_buckets
    ]
    if decodes or resolved.numerics is Numerics.STRICT:
        buckets += [(f"decode of {size} sequences", builder.decode((), size)) for size in resolved.decode_buckets]
    return buckets
