"""From sequences to `StepInputs`: the only place where a step's host arrays are made.

Three shapes of batch, each padded to a bucket:
    decode    one token per sequence row, T == B
    prefill   chunks of several sequences packed into T token rows, B sequence rows, T > B
    rows      the decode shape; a prefill chunk is one row per token of the same sequence (strict numerics, and prompts
              whose own log probabilities are wanted)
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from engine_core.sequence import Sequence
from engine_core.slot_table import SlotTable
from engine_core.step_io import SamplingInputs, StepInputs

HostArray = Any
"""A numpy array that stands where `StepInputs` declares a jax.Array: the call of the step moves it to the device."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + count)` of a sequence, to be computed in one step.

    Attributes:
        is_last: the chunk ends the known tokens, so its last row's logits are sampled.
    """

    sequence: Sequence
    start: int
    count: int
    is_last: bool


class BatchBuilder:
    """Builds step inputs from slot rows.

    Args:
        table: the slot rows.
    """

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._sampling_key: tuple[int, bytes] | None = None
        self._sampling: SamplingInputs | None = None

    def decode(self, sequences: Seq[Sequence], bucket: int) -> StepInputs:
        """One row per sequence: its token at place `num_dispatched`.

        Args:
            sequences: running sequences, each with a slot and pages for the new token.
            bucket: B, at least `len(sequences)`.
        """
        table = self._table
        count = len(sequences)
        slots = np.full(bucket, table.num_slots, np.int32)
        positions = np.zeros(bucket, np.int32)
        tokens = np.zeros(bucket, np.int32)
        token_slots = np.full(bucket, table.num_slots, np.int32)
        for i, sequence in enumerate(sequences):
            slots[i] = sequence.slot
            positions[i] = sequence.num_dispatched
            if sequence.token_on_host:
                tokens[i] = sequence.token_ids[-1]
            else:
                token_slots[i] = sequence.slot
        kv_lens = np.zeros(bucket, np.int32)
        kv_lens[:count] = positions[:count] + 1
        rows = np.full(bucket, bucket, np.int32)
        rows[:count] = np.arange(count, dtype=np.int32)
        cumulative = _cumulative(kv_lens > 0)
        return self._inputs(tokens, token_slots, positions, rows, kv_lens, slots, slots, cumulative)

    def prefill(self, chunks: Seq[Chunk], num_tokens: int, num_rows: int) -> StepInputs:
        """Chunks packed one behind the other.

        Args:
            chunks: at most `num_rows`, together at most `num_tokens` tokens.
            num_tokens: T.
            num_rows: B.
        """
        table = self._table
        tokens = np.zeros(num_tokens, np.int32)
        positions = np.zeros(num_tokens, np.int32)
        rows = np.full(num_tokens, num_rows, np.int32)
        q_lens = np.zeros(num_rows, np.int32)
        kv_lens = np.zeros(num_rows, np.int32)
        table_rows = np.full(num_rows, table.num_slots, np.int32)
        out_slots = np.full(num_rows, table.num_slots, np.int32)
        at = 0
        for i, chunk in enumerate(chunks):
            end = at + chunk.count
            stop = chunk.start + chunk.count
            tokens[at:end] = chunk.sequence.token_ids[chunk.start : stop]
            positions[at:end] = np.arange(chunk.start, stop, dtype=np.int32)
            rows[at:end] = i
            q_lens[i] = chunk.count
            kv_lens[i] = stop
            table_rows[i] = chunk.sequence.slot
            if chunk.is_last:
                out_slots[i] = chunk.sequence.slot
            at = end
        token_slots = np.full(num_tokens, table.num_slots, np.int32)
        cumulative = _cumulative(q_lens)
        return self._inputs(tokens, token_slots, positions, rows, kv_lens, table_rows, out_slots, cumulative)

    def row_prefill(self, chunks: Seq[Chunk], bucket: int) -> StepInputs:
        """Chunks as decode rows: `chunk.count` rows of the same sequence for each, at most `bucket` together.

        Each row gives the log probability of the prompt token behind its own; the last one, of the token it draws.
        """
        table = self._table
        scored: HostArray = np.full(bucket, table.vocab_size, np.int32)
        tokens = np.zeros(bucket, np.int32)
        positions = np.zeros(bucket, np.int32)
        kv_lens = np.zeros(bucket, np.int32)
        table_rows = np.full(bucket, table.num_slots, np.int32)
        out_slots = np.full(bucket, table.num_slots, np.int32)
        at = 0
        for chunk in chunks:
            end = at + chunk.count
            stop = chunk.start + chunk.count
            tokens[at:end] = chunk.sequence.token_ids[chunk.start : stop]
            positions[at:end] = np.arange(chunk.start, stop, dtype=np.int32)
            kv_lens[at:end] = positions[at:end] + 1
            table_rows[at:end] = chunk.sequence.slot
            following = chunk.sequence.token_ids[chunk.start + 1 : stop + 1]
            scored[at : at + len(following)] = following
            if chunk.is_last:
                out_slots[end - 1] = chunk.sequence.slot
            at = end
        rows = np.full(bucket, bucket, np.int32)
        rows[:at] = np.arange(at, dtype=np.int32)
        token_slots = np.full(bucket, table.num_slots, np.int32)
        cumulative = _cumulative(kv_lens > 0)
        inputs = self._inputs(tokens, token_slots, positions, rows, kv_lens, table_rows, out_slots, cumulative)
        return replace(inputs, sampling=replace(inputs.sampling, scored=scored))

    def _inputs(
        self,
        tokens: HostArray,
        token_slots: HostArray,
        positions: HostArray,
        rows: HostArray,
        kv_lens: HostArray,
        table_rows: HostArray,
        out_slots: HostArray,
        cu_q_lens: HostArray,
    ) -> StepInputs:
        draw: HostArray = kv_lens - self._table.num_prompt[table_rows]
        page_table: HostArray = self._table.page_table[table_rows]
        drawn: HostArray = np.full(len(kv_lens), self._table.vocab_size, np.int32)
        return StepInputs(
            tokens=tokens,
            token_slots=token_slots,
            positions=positions,
            rows=rows,
            page_table=page_table,
            kv_lens=kv_lens,
            cu_q_lens=cu_q_lens,
            logits_rows=np.maximum(cu_q_lens[1:] - 1, 0),
            slots=out_slots,
            sampling=replace(self._sampling_rows(table_rows), position=draw, scored=drawn),
        )

    def _sampling_rows(self, table_rows: HostArray) -> SamplingInputs:
        """Sampling rows of these slots, kept on the device until the batch changes: most steps reuse the last ones."""
        key = (self._table.version, table_rows.tobytes())
        if self._sampling is None or key != self._sampling_key:
            self._sampling = jax.device_put(self._gather_sampling(table_rows))
            self._sampling_key = key
        return self._sampling

    def _gather_sampling(self, table_rows: HostArray) -> SamplingInputs:
        t: Any = self._table
        temperature, top_k, top_p, min_p = (a[table_rows] for a in (t.temperature, t.top_k, t.top_p, t.min_p))
        presence, frequency, repetition = (
            a[table_rows] for a in (t.presence_penalty, t.frequency_penalty, t.repetition_penalty)
        )
        bias_ids = t.bias_ids[table_rows]
        penalised = (presence != 0) | (frequency != 0) | (repetition != 1)
        return SamplingInputs(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
            seed=t.seed[table_rows],
            position=t.num_prompt[table_rows],  # a place holder, as the next: every step brings its own
            scored=t.num_prompt[table_rows],
            bias_ids=bias_ids,
            bias_values=t.bias_values[table_rows],
            any_sampled=(temperature > 0).any(),
            any_filtered=((top_k > 0) | (top_p < 1) | (min_p > 0)).any(),
            any_adjusted=penalised.any() | (bias_ids < t.vocab_size).any(),
            any_logprobs=t.logprobs[table_rows].any(),
        )


def _cumulative(lengths: HostArray) -> HostArray:
    """`[0, l0, l0 + l1, ...]` as i32."""
    out = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=out[1:])
    return out
