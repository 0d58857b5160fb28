"""From sequences to `StepInputs`: the only place where a step's host arrays are made.

Three shapes of batch, each padded to a bucket:
    decode    one token per sequence row, T == B
    prefill   chunks of several sequences packed into T token rows, B sequence rows, T > B
    rows      the decode shape; a prefill chunk is one row per token of the same sequence (strict numerics, and prompts
              whose own log probabilities are wanted)
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np

from engine_core.sequence import Sequence
from engine_core.slot_table import SlotTable
from engine_core.step_io import SamplingInputs, StepInputs

T = TypeVar("T")
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


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work, and where its results are.

    Attributes:
        rows: sequence row of the step's output for each sequence or chunk, in the order in which they were given.
    """

    inputs: StepInputs
    rows: list[int]


@dataclass(frozen=True, slots=True)
class _ShardInputs:
    """Of one row shard: host arrays named as in `StepInputs`; `table_rows` are the slots that its rows belong to."""

    tokens: HostArray
    token_slots: HostArray
    positions: HostArray
    rows: HostArray
    kv_lens: HostArray
    table_rows: HostArray
    slots: HostArray
    cu_q_lens: HostArray
    scored: HostArray


class BatchBuilder:
    """Builds step inputs from slot rows: those of each row shard, one behind the other.

    Args:
        tables: the slot rows of each row shard.
        place: where sampling rows are kept while the batch does not change.
    """

    def __init__(
        self, tables: Seq[SlotTable], place: Callable[[SamplingInputs], SamplingInputs] = jax.device_put
    ) -> None:
        self._tables = tuple(tables)
        self._place = place
        self._sampling_key: tuple[tuple[int, ...], bytes] | None = None
        self._sampling: SamplingInputs | None = None

    def decode(self, sequences: Seq[Sequence], bucket: int) -> Batch:
        """One row per sequence: its token at place `num_dispatched`.

        Args:
            sequences: running sequences, each with a slot and pages for the new token.
            bucket: B of a row shard, at least as many as it has of `sequences`.
        """
        parts = self._by_shard(sequences, [sequence.shard for sequence in sequences])
        places = _places([sequence.shard for sequence in sequences], [1] * len(sequences), bucket)
        shards = zip(self._tables, parts, strict=True)
        return Batch(self._join([_decode_rows(table, part, bucket) for table, part in shards]), places)

    def prefill(self, chunks: Seq[Chunk], num_tokens: int, num_rows: int) -> Batch:
        """Chunks packed one behind the other.

        Args:
            chunks: of each row shard at most `num_rows`, together at most `num_tokens` tokens.
            num_tokens: T of a row shard.
            num_rows: B of a row shard.
        """
        parts = self._by_shard(chunks, [chunk.sequence.shard for chunk in chunks])
        places = _places([chunk.sequence.shard for chunk in chunks], [1] * len(chunks), num_rows)
        shards = zip(self._tables, parts, strict=True)
        return Batch(self._join([_packed(table, part, num_tokens, num_rows) for table, part in shards]), places)

    def row_prefill(self, chunks: Seq[Chunk], bucket: int) -> Batch:
        """Chunks as decode rows: `chunk.count` rows of the same sequence for each; a row shard has at most `bucket`.

        Each row gives the log probability of the prompt token behind its own; the last one, of the token it draws. Of
        a chunk's rows, `Batch.rows` names the last.
        """
        parts = self._by_shard(chunks, [chunk.sequence.shard for chunk in chunks])
        places = _places([chunk.sequence.shard for chunk in chunks], [chunk.count for chunk in chunks], bucket)
        shards = zip(self._tables, parts, strict=True)
        return Batch(self._join([_one_by_one(table, part, bucket) for table, part in shards]), places)

    def _by_shard(self, items: Seq[T], shards: Seq[int]) -> list[list[T]]:
        parts: list[list[T]] = [[] for _ in self._tables]
        for item, shard in zip(items, shards, strict=True):
            parts[shard].append(item)
        return parts

    def _join(self, parts: Seq[_ShardInputs]) -> StepInputs:
        table_rows = [part.table_rows for part in parts]
        shards = list(zip(self._tables, parts, strict=True))
        draw = [part.kv_lens - table.num_prompt[part.table_rows] for table, part in shards]
        return StepInputs(
            tokens=_concatenate([part.tokens for part in parts]),
            token_slots=_concatenate([part.token_slots for part in parts]),
            positions=_concatenate([part.positions for part in parts]),
            rows=_concatenate([part.rows for part in parts]),
            page_table=_concatenate([table.page_table[part.table_rows] for table, part in shards]),
            kv_lens=_concatenate([part.kv_lens for part in parts]),
            cu_q_lens=_concatenate([part.cu_q_lens for part in parts]),
            logits_rows=_concatenate([np.maximum(part.cu_q_lens[1:] - 1, 0) for part in parts]),
            slots=_concatenate([part.slots for part in parts]),
            sampling=replace(
                self._sampling_rows(table_rows),
                position=_concatenate(draw),
                scored=_concatenate([part.scored for part in parts]),
            ),
        )

    def _sampling_rows(self, table_rows: list[HostArray]) -> SamplingInputs:
        """Sampling rows of these slots, kept in place until the batch changes: most steps reuse the last ones."""
        key = tuple(table.version for table in self._tables), b"".join(rows.tobytes() for rows in table_rows)
        if self._sampling is None or key != self._sampling_key:
            parts = [_gather_sampling(table, rows) for table, rows in zip(self._tables, table_rows, strict=True)]
            joined: SamplingInputs = jax.tree.map(lambda *leaves: _joined(leaves), *parts)
            self._sampling = self._place(joined)
            self._sampling_key = key
        return self._sampling


def _decode_rows(table: SlotTable, sequences: Seq[Sequence], bucket: int) -> _ShardInputs:
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
    scored: HostArray = np.full(bucket, table.vocab_size, np.int32)
    return _ShardInputs(tokens, token_slots, positions, rows, kv_lens, slots, slots, _cumulative(kv_lens > 0), scored)


def _packed(table: SlotTable, chunks: Seq[Chunk], num_tokens: int, num_rows: int) -> _ShardInputs:
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
    scored: HostArray = np.full(num_rows, table.vocab_size, np.int32)
    cumulative = _cumulative(q_lens)
    return _ShardInputs(tokens, token_slots, positions, rows, kv_lens, table_rows, out_slots, cumulative, scored)


def _one_by_one(table: SlotTable, chunks: Seq[Chunk], bucket: int) -> _ShardInputs:
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
    return _ShardInputs(tokens, token_slots, positions, rows, kv_lens, table_rows, out_slots, cumulative, scored)


def _gather_sampling(table: SlotTable, table_rows: HostArray) -> SamplingInputs:
    t: Any = table
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


def _places(shards: Seq[int], counts: Seq[int], num_rows: int) -> list[int]:
    """Last row of each item, where items of a row shard take `counts` rows one behind the other, of its `num_rows`."""
    ends: dict[int, int] = {}
    places = []
    for shard, count in zip(shards, counts, strict=True):
        ends[shard] = ends.get(shard, 0) + count
        places.append(shard * num_rows + ends[shard] - 1)
    return places


def _concatenate(parts: list[HostArray]) -> HostArray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _joined(leaves: Seq[HostArray]) -> HostArray:
    """Rows behind one another; a switch of the whole batch is on where a shard needs it."""
    return _concatenate(list(leaves)) if leaves[0].ndim else np.asarray(leaves).any(axis=0)


def _cumulative(lengths: HostArray) -> HostArray:
    """`[0, l0, l0 + l1, ...]` as i32."""
    out = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=out[1:])
    return out
