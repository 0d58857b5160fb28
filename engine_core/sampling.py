"""Picking tokens on the device.

Greedy is argmax. Otherwise the order is: logit bias, penalties (CTRL, Keskar et al. 2019, section 4.1, for repetition;
OpenAI's API reference for presence and frequency), temperature, top-k, top-p (Holtzman et al. 2020) over the mass that
top-k left, min-p (Nguyen et al. 2024); then the inverse of the cumulative distribution at one uniform number. Filters
are thresholds, found by binary search over the bits of a float: exact, no sort. Tokens tied at a threshold all stay.

Randomness is a counter: one Threefry-2x32 block (Salmon et al. 2011) keyed by the request's seed, at the position of
the token. A row depends on nothing but itself: on a CPU rows even run one by one, each paying only for what it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from engine_core.step_io import SamplingInputs, SlotState, StepOutput
from engine_core.types import MAX_TOP_LOGPROBS

NOT_FINITE = -1
_LARGEST = 3.4028235e38  # finite float32
_LANES = 128  # vocabulary entries per chunk of the two-level cumulative sum
_GROUP = 16  # rows that a TPU samples at once: their logits stay in VMEM from one operation to the next
_SORTED_ROWS = 8  # whose log probabilities are sorted at once


class _Flags(NamedTuple):
    """What a row uses; on a CPU each row's own flags, elsewhere the batch's."""

    sampled: jax.Array  # [] bool
    filtered: jax.Array  # [] bool
    adjusted: jax.Array  # [] bool


def sample(
    logits: jax.Array, slots: SlotState, slot_ids: jax.Array, inputs: SamplingInputs
) -> tuple[StepOutput, SlotState]:
    """Pick one token per sequence row and note it in the row's slot.

    Args:
        logits: [B, V] f32, whole vocabulary on every device. A NaN never makes an id in a slot out of range.
        slots: donated by the caller's jit.
        slot_ids: [B] i32; S (out of range): padding, nothing is noted.
        inputs: see `SamplingInputs`.

    Returns:
        Tokens and log probabilities (of the logits as they came), and the slots with them noted. Of a row whose logits
        are not all finite the token is told as -1.
    """
    logits = logits.astype(jnp.float32)
    pick = {"cpu": _pick_one_by_one, "tpu": _pick_by_groups, "default": _pick_together}
    tokens = lax.platform_dependent(logits, slots, slot_ids, inputs, **pick)
    scored = jnp.where(inputs.scored < logits.shape[1], inputs.scored, tokens)
    logprobs, top_ids, top_logprobs = lax.cond(inputs.any_logprobs, _logprobs, _no_logprobs, logits, scored)
    noted = SlotState(
        last_tokens=slots.last_tokens.at[slot_ids].set(tokens, mode="drop", wrap_negative_indices=False),
        output_counts=slots.output_counts.at[slot_ids, tokens].add(1, mode="drop", wrap_negative_indices=False),
        in_prompt=slots.in_prompt,
    )
    told = jnp.where(_are_finite(logits), tokens, NOT_FINITE)
    return StepOutput(told, logprobs, top_ids, top_logprobs), noted


def init_slot(slots: SlotState, slot: jax.Array, prompt_ids: jax.Array, output_ids: jax.Array) -> SlotState:
    """Set the token counts of a slot for a sequence that uses penalties.

    Args:
        slots: donated by the caller's jit.
        slot: [] i32; S (out of range): nothing changes.
        prompt_ids: [M] i32, V (out of range) where unused.
        output_ids: [M] i32, generated before this life of the stream, V where unused.
    """
    vocab_size = slots.output_counts.shape[1]
    counts = jnp.zeros(vocab_size, jnp.int32).at[output_ids].add(1, mode="drop")
    in_prompt = jnp.zeros(vocab_size, bool).at[prompt_ids].set(True, mode="drop")
    return SlotState(
        last_tokens=slots.last_tokens,
        output_counts=slots.output_counts.at[slot].set(counts, mode="drop", wrap_negative_indices=False),
        in_prompt=slots.in_prompt.at[slot].set(in_prompt, mode="drop", wrap_negative_indices=False),
    )


def uniform(seed: jax.Array, position: jax.Array) -> jax.Array:
    """The random number of one draw.

    Args:
        seed: [2] u32, the Threefry key.
        position: [] i32, its counter.

    Returns:
        [] f32 in [0, 1), a multiple of 2 ** -24.
    """
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    word = jax.random.key_data(jax.random.fold_in(key, position))[0]
    return (word >> 8).astype(jnp.float32) * 2.0**-24


def _are_finite(logits: jax.Array) -> jax.Array:
    """Whether a row has neither NaN nor infinity: [B, V] -> [B] bool.

    One pass that XLA:CPU vectorizes, unlike one over truth values; its maximum passes NaN over.
    """
    finite: jax.Array = jnp.sum(logits * 0, axis=-1) == 0
    return finite


def _argmax(logits: jax.Array) -> jax.Array:
    """First index of the maximum over the last axis, NaN left out; the last index if there is nothing else.

    In two passes that XLA:CPU vectorizes, unlike its argmax.
    """
    places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    highest = jnp.max(jnp.where(jnp.isnan(logits), -jnp.inf, logits), axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == highest, places, logits.shape[-1] - 1), axis=-1)


def _pick_one_by_one(logits: jax.Array, slots: SlotState, slot_ids: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Greedy for all, then again, one by one, the rows that need more. The trip count is data: no row, no cost."""
    vocab_size = logits.shape[1]
    penalized = (inputs.presence_penalty != 0) | (inputs.frequency_penalty != 0) | (inputs.repetition_penalty != 1)
    flags = _Flags(
        sampled=inputs.temperature > 0,
        filtered=(inputs.top_k > 0) | (inputs.top_p < 1) | (inputs.min_p > 0),
        adjusted=penalized | jnp.any(inputs.bias_ids < vocab_size, axis=-1),
    )
    special = flags.sampled | flags.adjusted

    def pick(index: jax.Array, tokens: jax.Array) -> jax.Array:
        row, row_flags = jax.tree.map(lambda leaf: leaf[index] if leaf.ndim else leaf, (inputs, flags))
        slot = slot_ids[index]
        token = lax.cond(
            special[index], lambda: _pick(logits[index], row, row_flags, slots, slot), lambda: tokens[index]
        )
        return tokens.at[index].set(token)

    last = jnp.max(jnp.where(special, jnp.arange(1, 1 + special.size), 0))
    tokens: jax.Array = lax.fori_loop(0, last, pick, lax.map(_argmax, logits))
    return tokens


def _pick_by_groups(logits: jax.Array, slots: SlotState, slot_ids: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """`_pick_together` of a few rows after the other."""
    num_rows = slot_ids.size
    if num_rows % _GROUP or num_rows == _GROUP:
        return _pick_together(logits, slots, slot_ids, inputs)
    leaves, tree = jax.tree.flatten((logits, slot_ids, inputs))
    of_rows = [leaf.reshape(-1, _GROUP, *leaf.shape[1:]) for leaf in leaves if leaf.ndim]

    def pick(of_group: list[jax.Array]) -> jax.Array:
        rest = iter(of_group)
        logits, ids, own = jax.tree.unflatten(tree, [next(rest) if leaf.ndim else leaf for leaf in leaves])
        return _pick_together(logits, slots, ids, own)

    tokens: jax.Array = lax.map(pick, of_rows)
    return tokens.reshape(num_rows)


def _pick_together(logits: jax.Array, slots: SlotState, slot_ids: jax.Array, inputs: SamplingInputs) -> jax.Array:
    flags = _Flags(inputs.any_sampled, inputs.any_filtered, inputs.any_adjusted)
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, inputs)

    def pick() -> jax.Array:
        adjusted = lax.cond(flags.adjusted, _adjust_all, lambda logits, *_: logits, logits, inputs, slots, slot_ids)
        drawn = jax.vmap(_pick_adjusted, in_axes=(0, axes, None))
        return drawn(adjusted, inputs, flags)

    token: jax.Array = lax.cond(flags.sampled | flags.adjusted, pick, lambda: _argmax(logits))
    return token


def _pick(logits: jax.Array, row: SamplingInputs, flags: _Flags, slots: SlotState, slot: jax.Array) -> jax.Array:
    """One row: logits [V], row without its leading [B] -> token [] i32."""
    logits = lax.cond(flags.adjusted, _adjust, lambda logits, *_: logits, logits, row, slots, slot)
    return _pick_adjusted(logits, row, flags)


def _pick_adjusted(logits: jax.Array, row: SamplingInputs, flags: _Flags) -> jax.Array:
    token: jax.Array = lax.cond(
        flags.sampled,
        lambda: jnp.where(row.temperature > 0, _draw(logits, row, flags.filtered), _argmax(logits)),
        lambda: _argmax(logits),
    )
    return token


def _adjust_all(logits: jax.Array, inputs: SamplingInputs, slots: SlotState, slot_ids: jax.Array) -> jax.Array:
    """`_adjust` of every row: [B, V] -> [B, V].

    On a TPU one row after the other: gathers and scatters of many rows at once are unrolled there, and took two thirds
    of the time to compile a whole decode step of 128 rows.
    """
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, inputs)

    def together(logits: jax.Array, inputs: SamplingInputs, slots: SlotState, slot_ids: jax.Array) -> jax.Array:
        return jax.vmap(_adjust, in_axes=(0, axes, None, 0))(logits, inputs, slots, slot_ids)

    def one_by_one(logits: jax.Array, inputs: SamplingInputs, slots: SlotState, slot_ids: jax.Array) -> jax.Array:
        def adjust(index: jax.Array, logits: jax.Array) -> jax.Array:
            row = jax.tree.map(lambda leaf: leaf[index] if leaf.ndim else leaf, inputs)
            return logits.at[index].set(_adjust(logits[index], row, slots, slot_ids[index]))

        adjusted: jax.Array = lax.fori_loop(0, logits.shape[0], adjust, logits)
        return adjusted

    adjusted: jax.Array = lax.platform_dependent(logits, inputs, slots, slot_ids, tpu=one_by_one, default=together)
    return adjusted


def _adjust(logits: jax.Array, row: SamplingInputs, slots: SlotState, slot: jax.Array) -> jax.Array:
    """Add the biases, then the penalties."""
    counts = slots.output_counts.at[slot].get(mode="fill", fill_value=0)  # [V]
    seen = (counts > 0) | slots.in_prompt.at[slot].get(mode="fill", fill_value=False)
    logits = logits.at[row.bias_ids].add(row.bias_values, mode="drop", wrap_negative_indices=False)
    repeated = jnp.where(logits > 0, logits / row.repetition_penalty, logits * row.repetition_penalty)
    logits = jnp.where(seen, repeated, logits)
    return logits - row.frequency_penalty * counts - jnp.where(counts > 0, row.presence_penalty, 0)


def _draw(logits: jax.Array, row: SamplingInputs, filtered: jax.Array) -> jax.Array:
    """Draw one token: logits [V] -> [] i32."""
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _LARGEST))
    top = jnp.maximum(jnp.max(logits), -_LARGEST)
    temperature = jnp.where(row.temperature > 0, row.temperature, 1)
    mass = jnp.exp((logits - top) / temperature)  # the likeliest has 1
    mass = lax.cond(filtered, _filter, lambda _, mass, *__: mass, logits, mass, top, row)
    return _inverse_cdf(mass, uniform(row.seed, row.position))


def _filter(logits: jax.Array, mass: jax.Array, top: jax.Array, row: SamplingInputs) -> jax.Array:
    """Zero the mass of what top-k, top-p and min-p exclude."""
    by_count = _threshold(lambda at: jnp.sum(logits >= at), row.top_k, top, row.top_k > 0)
    mass = jnp.where(logits >= by_count, mass, 0)
    goal = row.top_p * jnp.sum(mass)
    by_mass = _threshold(lambda at: jnp.sum(jnp.where(logits >= at, mass, 0)), goal, top, row.top_p < 1)
    return jnp.where((logits >= by_mass) & (mass >= row.min_p), mass, 0)


def _threshold(
    measure: Callable[[jax.Array], jax.Array], goal: jax.Array, top: jax.Array, active: jax.Array
) -> jax.Array:
    """Find a float t <= top with `measure(t) >= goal`, the largest unless `measure(t) == goal`; -inf if inactive.

    `measure` never rises with t, so where it equals the goal, it measures the same set as at the largest t. Floats,
    read as integers with the order of negative ones reversed, are in order: at most 32 halvings find t exactly.
    """

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # mean, rounded up, without overflow
        measured = measure(_from_order(middle))
        return (
            jnp.where(measured >= goal, middle, low),
            jnp.where(measured > goal, high, jnp.where(measured == goal, middle, middle - 1)),
        )

    lowest = _to_order(jnp.full_like(top, -jnp.inf))
    bounds = (lowest, jnp.where(active, _to_order(top), lowest))
    return _from_order(lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, bounds)[0])


def _to_order(value: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_order(order: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(order ^ ((order >> 31) & 0x7FFFFFFF), jnp.float32)


def _chunks(mass: jax.Array) -> jax.Array:
    return jnp.pad(mass, (0, -mass.size % _LANES)).reshape(-1, _LANES)


def _inverse_cdf(mass: jax.Array, at: jax.Array) -> jax.Array:
    """Find the first token whose cumulative mass exceeds `at` of the whole: mass [V], at [] in [0, 1) -> [] i32."""
    chunks = _chunks(mass)
    per_chunk = jnp.sum(chunks, axis=1)
    chunk, rest = _find(per_chunk, at * jnp.sum(per_chunk))
    lane, _ = _find(chunks[chunk], rest)
    return chunk * _LANES + lane


def _find(mass: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index with mass whose cumulative sum exceeds target, else the last with mass; and what target has left."""
    ends = jnp.cumsum(mass)
    index = jnp.arange(mass.size, dtype=jnp.int32)
    first = jnp.min(jnp.where((ends > target) & (mass > 0), index, mass.size))
    last = jnp.max(jnp.where(mass > 0, index, 0))
    found = jnp.minimum(first, last)
    return found, target - jnp.where(found > 0, ends[found - 1], 0)


def _logprobs(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A few rows at a time: sorting takes several times their memory."""

    def of_row(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits, token = row
        logprobs = jax.nn.log_softmax(logits)
        top_logprobs, top_ids = lax.top_k(logprobs, min(MAX_TOP_LOGPROBS, logits.size))
        return logprobs[token], top_ids, top_logprobs

    found: tuple[jax.Array, jax.Array, jax.Array] = lax.map(of_row, (logits, tokens), batch_size=_SORTED_ROWS)
    return found


def _no_logprobs(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape = (tokens.size, min(MAX_TOP_LOGPROBS, logits.shape[1]))
    return jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
