"""The pytrees that enter and leave a step. Shapes are static per bucket (T, B); everything else is data.

Dims: T token rows, B sequence rows, P pages per sequence, S slots, V vocabulary, J logit-bias entries, L top logprobs.
A decode bucket has T == B, one token per sequence row; a prefill bucket packs chunks of up to B sequences into T rows.
Padding: token rows beyond the last real one have `rows == B` and are neither written to the cache nor attended;
sequence rows beyond the last real one have `kv_lens == 0` and `slots == S`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingInputs:
    """Per sequence row; see `engine_core.types.SamplingParams` for meanings."""

    temperature: jax.Array  # [B] f32, 0 is greedy
    top_k: jax.Array  # [B] i32, 0 is off
    top_p: jax.Array  # [B] f32
    min_p: jax.Array  # [B] f32
    presence_penalty: jax.Array  # [B] f32
    frequency_penalty: jax.Array  # [B] f32
    repetition_penalty: jax.Array  # [B] f32
    seed: jax.Array  # [B, 2] u32, low and high word
    position: jax.Array  # [B] i32, index among generated tokens of the token to draw: the counter
    scored: jax.Array  # [B] i32, token whose log probability is wanted; V (out of range): the drawn one
    bias_ids: jax.Array  # [B, J] i32, V (out of range) where unused
    bias_values: jax.Array  # [B, J] f32
    any_sampled: jax.Array  # [] bool: some row has temperature > 0 (else the sort-free greedy path runs)
    any_filtered: jax.Array  # [] bool: some row uses top_k, top_p or min_p
    any_adjusted: jax.Array  # [] bool: some row has a penalty or a logit bias
    any_logprobs: jax.Array  # [] bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """One step's work."""

    tokens: jax.Array  # [T] i32, known to the host; ignored where token_slots < S
    token_slots: jax.Array  # [T] i32, slot whose last sampled token is this row's input; S: use `tokens`
    positions: jax.Array  # [T] i32, place in the sequence
    rows: jax.Array  # [T] i32, sequence row of each token row; B is padding
    page_table: jax.Array  # [B, P] i32, page ids in order; num_pages (out of range) where unused
    kv_lens: jax.Array  # [B] i32, tokens in the cache once this step's are written
    cu_q_lens: jax.Array  # [B + 1] i32, token rows of sequence row b are [cu_q_lens[b], cu_q_lens[b + 1])
    logits_rows: jax.Array  # [B] i32, token row whose logits are sampled (the last one of each sequence row)
    slots: jax.Array  # [B] i32, slot that receives the sampled token; S: dropped
    sampling: SamplingInputs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotState:
    """What stays on the device between steps. Donated by every step."""

    last_tokens: jax.Array  # [S] i32, last sampled token of each slot
    output_counts: jax.Array  # [S, V] i32, how often each token was generated (kept where penalties are used)
    in_prompt: jax.Array  # [S, V] bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What the host reads."""

    tokens: jax.Array  # [B] i32, sampled token of each sequence row; -1 where its logits are not all finite
    logprobs: jax.Array  # [B] f32, its log probability (0 unless any_logprobs)
    top_ids: jax.Array  # [B, L] i32
    top_logprobs: jax.Array  # [B, L] f32
