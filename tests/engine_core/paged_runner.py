"""A minimal engine for tests: builds `StepInputs` by hand and runs a model through a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from engine_core.config import Degrees
from engine_core.kernels.cpu.choice import CpuKernels
from engine_core.kv_cache import CacheLayout, create_cache
from engine_core.layers.linear import choose_numbers
from engine_core.layers.moe import choose_experts
from engine_core.mesh import ROWS, by_rows, cache_axes, make_mesh
from engine_core.models.decoder import Decoder
from engine_core.models.registry import load_spec
from engine_core.step import build_step, input_specs, param_specs
from engine_core.step_io import SamplingInputs, SlotState, StepInputs
from engine_core.weights import load_params

PAGE_SIZE = 4
PAGES_PER_ROW = 16
NUM_PAGES = 24
NUM_SLOTS = 5
ONE_DEVICE = Degrees()
HELD_BY_HOST = NUM_SLOTS  # as token_slots: the host knows the token


@dataclass
class Chunk:
    """Tokens of one sequence to run in a step: `tokens[start : start + count]`, on the sequence's pages."""

    pages: list[int]
    start: int
    tokens: Sequence[int]
    token_slot: int = HELD_BY_HOST
    slot: int = NUM_SLOTS


def greedy_sampling(rows: int, vocab: int) -> SamplingInputs:
    zeros, ids = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    false = np.array(False)
    return SamplingInputs(
        temperature=zeros,
        top_k=ids,
        top_p=zeros + 1,
        min_p=zeros,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        repetition_penalty=zeros + 1,
        seed=np.zeros((rows, 2), np.uint32),
        position=ids,
        scored=ids + vocab,
        bias_ids=np.full((rows, 4), vocab, np.int32),
        bias_values=np.zeros((rows, 4), np.float32),
        any_sampled=false,
        any_filtered=false,
        any_adjusted=false,
        any_logprobs=false,
    )


def step_inputs(chunks: Sequence[Chunk], *, num_tokens: int, num_rows: int, vocab: int) -> StepInputs:
    """Pack chunks into a (T, B) bucket."""
    tokens, positions = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    token_slots = np.full(num_tokens, NUM_SLOTS, np.int32)
    rows = np.full(num_tokens, num_rows, np.int32)
    page_table = np.full((num_rows, PAGES_PER_ROW), NUM_PAGES, np.int32)
    kv_lens, logits_rows = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
    cu_q_lens = np.zeros(num_rows + 1, np.int32)
    slots = np.full(num_rows, NUM_SLOTS, np.int32)
    at = 0
    for row, chunk in enumerate(chunks):
        end = at + len(chunk.tokens)
        tokens[at:end] = chunk.tokens
        positions[at:end] = np.arange(chunk.start, chunk.start + len(chunk.tokens))
        token_slots[at:end] = chunk.token_slot
        rows[at:end] = row
        page_table[row, : len(chunk.pages)] = chunk.pages
        kv_lens[row] = chunk.start + len(chunk.tokens)
        slots[row] = chunk.slot
        logits_rows[row] = end - 1
        cu_q_lens[row + 1 :] = at = end
    return StepInputs(
        tokens=tokens,
        token_slots=token_slots,
        positions=positions,
        rows=rows,
        page_table=page_table,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        logits_rows=logits_rows,
        slots=slots,
        sampling=greedy_sampling(num_rows, vocab),
    )


class PagedRunner:
    """Params, cache, slots and the jitted step of one checkpoint."""

    def __init__(
        self,
        directory: Path,
        *,
        scan: bool,
        degrees: Degrees = ONE_DEVICE,
        dtype: str = "float32",
        experts: str = "auto",
        kernels: CpuKernels | None = None,
        cache_dtype: str = "",
    ) -> None:
        self.spec = load_spec(directory)
        self.shards = degrees.row_shards
        self.mesh = make_mesh(degrees, jax.devices())
        choice = choose_experts(experts, dtype, "cpu")
        numbers = choose_numbers(dtype, "cpu")
        if kernels is not None:
            numbers = replace(numbers, kernels=kernels, weight=kernels.weight)
        self.model = Decoder(self.spec, numbers, degrees=degrees, experts=choice, scan=scan)
        self.params = load_params(directory, self.model, self.mesh, None)
        self._layout = CacheLayout(
            num_layers=self.spec.num_layers,
            num_pages=NUM_PAGES * self.shards,
            page_size=PAGE_SIZE,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            dtype=cache_dtype or dtype,
            head_align=1,
            tp=degrees.tp,
        )
        self.step = build_step(self.model, self.mesh)
        cache_spec = P(*cache_axes(scan))
        forward = jax.shard_map(
            self.model.forward,
            mesh=self.mesh,
            in_specs=(param_specs(self.model), cache_spec, P(ROWS), input_specs()),
            out_specs=(P(ROWS), cache_spec),
            check_vma=False,
        )
        self._forward = jax.jit(forward)
        self.reset()

    def reset(self) -> None:
        """An empty cache and empty slots."""
        self.cache = create_cache(self._layout, self.mesh, self.model.scan)
        vocab = self.spec.vocab_size
        slots = SlotState(
            last_tokens=jnp.zeros(NUM_SLOTS * self.shards, jnp.int32),
            output_counts=jnp.zeros((NUM_SLOTS * self.shards, vocab), jnp.int32),
            in_prompt=jnp.zeros((NUM_SLOTS * self.shards, vocab), bool),
        )
        self.slots = jax.device_put(slots, by_rows(self.mesh))

    def inputs(self, chunks: Sequence[Chunk], num_tokens: int, num_rows: int) -> StepInputs:
        """Inputs that run `chunks` on every row shard."""
        return self._inputs([chunks] * self.shards, num_tokens, num_rows)

    def run(self, chunks: Sequence[Chunk], num_tokens: int, num_rows: int) -> np.ndarray:
        """One step on one row shard; the drawn tokens [B]. Tokens that a slot holds are hidden from the step."""
        return self.run_shards([chunks], num_tokens, num_rows)[0]

    def run_shards(self, work: Sequence[Sequence[Chunk]], num_tokens: int, num_rows: int) -> np.ndarray:
        """The same with chunks for each row shard: [shards, B]."""
        inputs = self._inputs(work, num_tokens, num_rows)
        inputs.tokens[inputs.token_slots < NUM_SLOTS] = 0
        self.cache, self.slots, output = self.step(self.params, self.cache, self.slots, inputs)
        return np.asarray(output.tokens).reshape(self.shards, num_rows)

    def logits(self, chunks: Sequence[Chunk], num_tokens: int, num_rows: int) -> np.ndarray:
        """[T, V] logits that the step would compute on one row shard; changes nothing."""
        return self.shard_logits([chunks], num_tokens, num_rows)[0]

    def shard_logits(self, work: Sequence[Sequence[Chunk]], num_tokens: int, num_rows: int) -> np.ndarray:
        """The same with chunks for each row shard: [shards, T, V]."""
        inputs = self._inputs(work, num_tokens, num_rows)
        every = np.tile(np.arange(num_tokens, dtype=np.int32), self.shards)
        inputs = replace(inputs, logits_rows=every)
        logits, _ = self._forward(self.params, self.cache, inputs.tokens, inputs)
        return np.asarray(logits).reshape(self.shards, num_tokens, -1)

    def _inputs(self, work: Sequence[Sequence[Chunk]], num_tokens: int, num_rows: int) -> StepInputs:
        assert len(work) == self.shards
        vocab = self.spec.vocab_size
        parts = [step_inputs(chunks, num_tokens=num_tokens, num_rows=num_rows, vocab=vocab) for chunks in work]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays) if arrays[0].ndim else arrays[0], *parts)


def replay(tokens_a: list[int], tokens_b: list[int], lengths: tuple[int, int], shared: int):
    """Serve two sequences whose prompts share `shared` tokens: chunks of odd sizes, packed, then decode steps.

    Yields:
        (chunks, num_tokens, num_rows, [(sequence index, first position)] per chunk): steps in order. The caller runs
        `runner.run` on each before it asks for the next.
    """
    length_a, length_b = lengths
    pages_a = [7, 3, 11, 0, 23, 5, 9, 1, 14, 2, 20, 21, 22]
    pages_b = [*pages_a[: shared // PAGE_SIZE], 8, 6, 4, 10, 12, 13, 15]
    first, second = shared, shared + 14

    def prompt(tokens, pages, start, stop, slot=NUM_SLOTS):
        return Chunk(pages, start, tokens[start:stop], slot=slot)

    yield [prompt(tokens_a, pages_a, 0, first)], 32, 3, [(0, 0)]
    yield (
        [prompt(tokens_a, pages_a, first, second), prompt(tokens_b, pages_b, shared, length_b, slot=0)],
        32,
        3,
        [(0, first), (1, shared)],
    )
    yield [prompt(tokens_a, pages_a, second, length_a, slot=2)], 32, 3, [(0, second)]
    steps = min(len(tokens_a) - length_a, len(tokens_b) - length_b)
    for i in range(steps):
        a = Chunk(pages_a, length_a + i, [tokens_a[length_a + i]], token_slot=2, slot=2)
        b = Chunk(pages_b, length_b + i, [tokens_b[length_b + i]], token_slot=0, slot=0)
        yield [b, a], 4, 4, [(1, length_b + i), (0, length_a + i)]
