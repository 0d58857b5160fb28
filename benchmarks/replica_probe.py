"""Decode and prefill speed of a replica, without a worker around it."""

from __future__ import annotations

import time
from pathlib import Path

import jax

from engine_core.batch import Chunk
from engine_core.config import BatchConfig, CacheConfig, EngineConfig, ModelConfig
from engine_core.replica_loader import open_replica
from engine_core.sequence import Sequence
from engine_core.types import Request, SamplingParams


class ReplicaProbe:
    """A replica that is driven step by step.

    Args:
        model: checkpoint directory.
        dtype: compute dtype.
        max_batch: sequences at once.
        prompt: tokens of a prefill measurement.
        context: tokens in the cache when decoding starts.
        cpu_kernels: as in the configuration.
    """

    def __init__(self, model: Path, dtype: str, max_batch: int, prompt: int, context: int, cpu_kernels: str) -> None:
        length = prompt + 128
        pages = -(-length // 16)
        config = EngineConfig(
            model=ModelConfig(path=str(model), dtype=dtype, cpu_kernels=cpu_kernels),
            cache=CacheConfig(num_pages=pages * (max_batch + 1)),
            batch=BatchConfig(num_slots=max_batch, max_model_len=length, prefill_tokens=prompt),
            prefix_cache=False,
        )
        self._context = context
        self._replica = open_replica(config, model, lambda _: None, decodes=True)

    def decode(self, batch: int, steps: int) -> float:
        """Tokens/s of the best of `steps` decode steps with `batch` sequences."""
        memory = self._replica.memory
        sequences = [self._filled(i, self._context) for i in range(batch)]
        best = float("inf")
        for _ in range(steps + 1):
            for sequence in sequences:
                memory.grow(sequence, sequence.num_dispatched + 1)
            start = time.perf_counter()
            self._replica.dispatch_decode(sequences)[0].tokens()
            best = min(best, time.perf_counter() - start)
            for sequence in sequences:
                sequence.num_dispatched += 1
        for sequence in sequences:
            memory.release(sequence)
        return batch / best

    def prefill(self, size: int, steps: int) -> float:
        """Tokens/s of the best of `steps` prefills of `size` tokens."""
        best = float("inf")
        for i in range(steps):
            sequence = self._open(i, size)
            start = time.perf_counter()
            self._replica.dispatch_prefill([Chunk(sequence, 0, size, is_last=True)])[0].tokens()
            best = min(best, time.perf_counter() - start)
            self._replica.memory.release(sequence)
        return size / best

    def _open(self, number: int, size: int) -> Sequence:
        tokens = [(number * 7919 + i * 104729) % 1000 for i in range(size)]
        sampling = SamplingParams(temperature=0.0, max_tokens=1 << 20)
        sequence = Sequence.of(Request(f"bench-{number}", tokens, size, sampling))
        placed = self._replica.memory.place(sequence, computes=True)
        assert placed, "the cache has room for every sequence of a batch"
        return sequence

    def _filled(self, number: int, size: int) -> Sequence:
        sequence = self._open(number, size)
        self._replica.dispatch_prefill([Chunk(sequence, 0, size, is_last=True)])[0].tokens()
        sequence.num_dispatched = size
        jax.effects_barrier()
        return sequence
