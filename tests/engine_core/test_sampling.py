"""Sampling: filters and penalties against plain numpy, draws against their distribution, bits against neighbours."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine_core import sampling
from engine_core.sampling import init_slot, sample, uniform
from engine_core.step_io import SamplingInputs, SlotState
from engine_core.types import MAX_TOP_LOGPROBS

NUM_SLOTS = 5
run = jax.jit(sample)


def make_slots(vocab, num_slots=NUM_SLOTS):
    return SlotState(
        last_tokens=jnp.zeros(num_slots, jnp.int32),
        output_counts=jnp.zeros((num_slots, vocab), jnp.int32),
        in_prompt=jnp.zeros((num_slots, vocab), bool),
    )


def make_inputs(rows, vocab, *, seeds=None, positions=None, scored=None, bias=None, logprobs=False, **given):
    """Inputs of `rows` rows; a keyword is a number for all or a list with one per row."""
    neutral = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0}
    neutral |= {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
    values = {name: np.broadcast_to(given.get(name, value), rows) for name, value in neutral.items()}
    seed = np.zeros((rows, 2), np.uint32)
    seed[:, 0] = np.arange(rows) if seeds is None else seeds
    bias_ids = np.full((rows, 4), vocab, np.int32)
    bias_values = np.zeros((rows, 4), np.float32)
    for row, pairs in enumerate(bias or []):
        for at, (token, value) in enumerate(pairs):
            bias_ids[row, at], bias_values[row, at] = token, value
    changed = {name: bool(np.any(values[name] != neutral[name])) for name in neutral}
    arrays = {name: jnp.asarray(v, jnp.int32 if name == "top_k" else jnp.float32) for name, v in values.items()}
    return SamplingInputs(
        **arrays,
        seed=jnp.asarray(seed),
        position=jnp.asarray(np.zeros(rows) if positions is None else positions, jnp.int32),
        scored=jnp.full(rows, vocab, jnp.int32) if scored is None else jnp.asarray(scored, jnp.int32),
        bias_ids=jnp.asarray(bias_ids),
        bias_values=jnp.asarray(bias_values),
        any_sampled=jnp.asarray(changed["temperature"]),
        any_filtered=jnp.asarray(changed["top_k"] or changed["top_p"] or changed["min_p"]),
        any_adjusted=jnp.asarray(bool(bias) or any(changed[name] for name in changed if name.endswith("penalty"))),
        any_logprobs=jnp.asarray(logprobs),
    )


def pick(logits, inputs, slots=None, slot_ids=None):
    """Tokens as numpy."""
    rows, vocab = logits.shape
    slot_ids = jnp.full(rows, NUM_SLOTS, jnp.int32) if slot_ids is None else jnp.asarray(slot_ids, jnp.int32)
    output, _ = run(jnp.asarray(logits, jnp.float32), slots or make_slots(vocab), slot_ids, inputs)
    return np.asarray(output.tokens)


def allowed(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Plain numpy: probability of each token after the filters, ties at a threshold kept."""
    x = np.asarray(logits, np.float64) / temperature
    p = np.exp(x - x.max())
    if top_k:
        p[p < np.sort(p)[-min(top_k, p.size)]] = 0
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        count = int(np.argmax(np.cumsum(p[order]) >= top_p - 1e-9)) + 1
        p[p < p[order[count - 1]]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def draws(logits, count, **given):
    """`count` draws of one distribution: many rows, and positions."""
    rows = 64
    tokens = []
    for position in range(count // rows):
        inputs = make_inputs(rows, logits.size, positions=np.full(rows, position), **given)
        tokens.append(pick(np.tile(logits, (rows, 1)), inputs))
    return np.concatenate(tokens)


def test_uniform_golden_values():
    seeds = jnp.asarray([[0, 0], [1, 0], [0, 1], [0xFFFFFFFF, 0xFFFFFFFF], [7, 9]], jnp.uint32)
    positions = jnp.asarray([0, 1, 2, 2**31 - 1, 1000], jnp.int32)
    words = [threefry(s, (0, p)) for s, p in zip(seeds.tolist(), positions.tolist(), strict=True)]
    assert words[0] == 0x6B200159, "Random123's known answer"
    drawn = np.asarray(jax.vmap(uniform)(seeds, positions))
    np.testing.assert_array_equal(drawn, np.float32([(word >> 8) / 2**24 for word in words]))


def threefry(key, counter):
    """Word 0 of Threefry-2x32 with 20 rounds (Salmon et al. 2011), in plain integers."""
    mask = 0xFFFFFFFF
    keys = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA]
    a, b = (counter[0] + keys[0]) & mask, (counter[1] + keys[1]) & mask
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            a = (a + b) & mask
            b = ((b << turn | b >> (32 - turn)) & mask) ^ a
        a = (a + keys[(group + 1) % 3]) & mask
        b = (b + keys[(group + 2) % 3] + group + 1) & mask
    return a


def test_greedy_takes_the_first_maximum_and_notes_it():
    logits = np.zeros((3, 300), np.float32)
    logits[0, [7, 250]] = 1
    logits[1, 299] = 1
    slots = make_slots(300)
    output, noted = run(jnp.asarray(logits), slots, jnp.asarray([2, NUM_SLOTS, 0]), make_inputs(3, 300))
    assert np.asarray(output.tokens).tolist() == [7, 299, 0]
    assert np.asarray(noted.last_tokens).tolist() == [0, 0, 7, 0, 0]
    assert np.asarray(noted.output_counts[2, 7]) == 1
    assert np.asarray(noted.output_counts).sum() == 2
    assert not np.asarray(output.logprobs).any()


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 1.7},
    {"top_k": 3, "temperature": 0.3},
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("given", FILTERS)
def test_filters_against_numpy(given, ties):
    """Every token allowed is drawn sooner or later, no other ever."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal(40) * 2 - 1
    if ties:
        logits = np.round(logits * 2) / 2
    expected = allowed(logits, **given)
    given = {"temperature": 1.0} | given
    tokens = draws(np.float32(logits), 2048, **given)
    counts = np.bincount(tokens, minlength=40)
    assert not counts[expected == 0].any(), "a filtered token was drawn"
    assert counts[expected > 0.005].all(), "an allowed token never came"
    assert chi_square(counts, expected) < 1


def chi_square(counts, probabilities):
    """The statistic over its 99.99 % quantile (Wilson and Hilferty's approximation); rare cells are merged."""
    expected = counts.sum() * probabilities
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    free = max(1, np.count_nonzero(expected) - 1)
    keep = expected > 0
    statistic = float((((observed - expected) ** 2)[keep] / expected[keep]).sum())
    return statistic / (free * (1 - 2 / (9 * free) + 3.72 * np.sqrt(2 / (9 * free))) ** 3)


def test_top_k_is_exact_between_neighbouring_floats():
    base = np.float32(3.0)
    logits = np.float32([base, np.nextafter(base, np.float32(4)), -1, base, -0.0, 0.0])
    assert set(draws(logits, 256, temperature=100.0, top_k=1).tolist()) == {1}
    assert set(draws(logits, 256, temperature=100.0, top_k=2).tolist()) == {0, 1, 3}
    assert set(draws(logits, 512, temperature=100.0, top_k=4).tolist()) == {0, 1, 3, 4, 5}


def test_draws_follow_a_large_vocabulary():
    """Over many chunks of the two-level cumulative sum, with a vocabulary that is no multiple of one."""
    rng = np.random.default_rng(4)
    logits = rng.standard_normal(1000).astype(np.float32)
    counts = np.bincount(draws(logits, 8192, temperature=0.7), minlength=1000)
    assert chi_square(counts, allowed(logits, temperature=0.7)) < 1


def test_inverse_cdf_never_takes_what_has_no_mass():
    """Not at the ends of [0, 1), not beside the chunk borders, and not where rounding leaves a rest."""
    invert = jax.jit(jax.vmap(sampling._inverse_cdf, in_axes=(None, 0)))
    mass = np.zeros(700, np.float32)
    mass[[130, 255, 256, 511, 650]] = [0.1, 0.3, 1, 0.25, 0.1]
    at = jnp.asarray([0, 0.05, 0.1, 0.5, 0.8, 0.99, 1 - 2**-24], jnp.float32)
    assert np.asarray(invert(jnp.asarray(mass), at)).tolist() == [130, 130, 255, 256, 511, 650, 650]


def test_same_seed_and_position_same_token_else_not():
    rng = np.random.default_rng(5)
    logits = np.tile(rng.standard_normal(500), (6, 1))
    seeds, positions = [1, 1, 2, 2, 1, 1], [0, 0, 0, 0, 1, 2]
    tokens = pick(logits, make_inputs(6, 500, seeds=seeds, positions=positions, temperature=1.0))
    assert tokens[0] == tokens[1]
    assert tokens[2] == tokens[3]
    assert len({tokens[0], tokens[2], tokens[4], tokens[5]}) > 1


@pytest.mark.parametrize("given", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.3, "top_p": 0.9}])
def test_rows_do_not_depend_on_neighbours_row_or_bucket(given):
    """Equal bits: the draw's token, and its log probability."""
    rng = np.random.default_rng(6)
    vocab, rows = 3000, 8
    logits = rng.standard_normal((rows, vocab)).astype(np.float32)
    slots = make_slots(vocab)

    def output(order, bucket):
        padded = np.zeros((bucket, vocab), np.float32)
        padded[: len(order)] = logits[order]
        given_rows = {name: np.resize(value, bucket) for name, value in given.items()}
        given_rows["temperature"] = np.where(np.arange(bucket) < len(order), given_rows["temperature"], 0)
        seeds = np.append(np.asarray(order), np.zeros(bucket - len(order)))
        inputs = make_inputs(bucket, vocab, seeds=seeds, logprobs=True, **given_rows)
        result, _ = run(jnp.asarray(padded), slots, jnp.full(bucket, NUM_SLOTS), inputs)
        return [np.asarray(x)[: len(order)] for x in (result.tokens, result.logprobs, result.top_logprobs)]

    whole = output(list(range(rows)), rows)
    for order, bucket in ((rng.permutation(rows), rows), ([3], 1), ([5, 2], 4), ([7, 0, 1], 32)):
        for got, expected in zip(output(list(order), bucket), whole, strict=True):
            np.testing.assert_array_equal(got, expected[np.asarray(order)])


@pytest.mark.parametrize(("path", "times"), [(sampling._pick_together, 1), (sampling._pick_by_groups, 8)])
def test_accelerator_path_equals_cpu_path(path, times):
    rng = np.random.default_rng(7)
    rows = 6 * times
    logits = rng.standard_normal((rows, 700)).astype(np.float32)
    inputs = make_inputs(
        rows, 700, temperature=[0, 1, 1, 0.5, 2, 0] * times, top_k=[0, 0, 9, 0, 50, 0] * times,
        top_p=[1, 1, 1, 0.7, 0.9, 1] * times, min_p=[0, 0.1, 0, 0, 0, 0] * times,
        repetition_penalty=[1, 1, 1, 1, 1.5, 2] * times, bias=[[(3, 9.0)]],
    )  # fmt: skip
    args = (jnp.asarray(logits), make_slots(700), jnp.full(rows, NUM_SLOTS), inputs)
    np.testing.assert_array_equal(np.asarray(jax.jit(path)(*args)), pick(logits, inputs))


def test_penalties_and_bias_against_numpy():
    rng = np.random.default_rng(8)
    vocab, rows = 30, 40
    penalties = {
        "presence_penalty": rng.uniform(-2, 2, rows),
        "frequency_penalty": rng.uniform(-2, 2, rows),
        "repetition_penalty": rng.uniform(0.5, 2, rows),
    }
    prompt, output = [3, 3, 4], [4, 5, 5, 5]
    start = jax.jit(init_slot, donate_argnums=0)
    slots = start(make_slots(vocab), jnp.int32(1), pad(prompt, vocab), pad(output, vocab))
    bias = [[(int(rng.integers(vocab)), float(rng.uniform(-5, 5)))] for _ in range(rows)]
    logits = rng.standard_normal((rows, vocab)).astype(np.float32) * 2
    logits[::2] -= 9  # below zero a repetition penalty multiplies
    inputs = make_inputs(rows, vocab, bias=bias, **penalties)
    tokens = pick(logits, inputs, slots, np.full(rows, 1))

    counts = np.bincount(output, minlength=vocab)
    seen = (counts > 0) | (np.bincount(prompt, minlength=vocab) > 0)
    for row in range(rows):
        x = logits[row].astype(np.float64)
        x[bias[row][0][0]] += bias[row][0][1]
        ratio = penalties["repetition_penalty"][row]
        x = np.where(seen, np.where(x > 0, x / ratio, x * ratio), x)
        x -= penalties["frequency_penalty"][row] * counts + penalties["presence_penalty"][row] * (counts > 0)
        assert tokens[row] == x.argmax()


def pad(ids, vocab, size=8):
    return jnp.asarray(ids + [vocab] * (size - len(ids)), jnp.int32)


def test_init_slot_resets_and_drops():
    start = jax.jit(init_slot, donate_argnums=0)
    slots = replace(make_slots(20), output_counts=jnp.ones((NUM_SLOTS, 20), jnp.int32))
    slots = start(slots, jnp.int32(2), pad([1, 1], 20), pad([], 20))
    assert not np.asarray(slots.output_counts[2]).any()
    assert np.asarray(slots.in_prompt).sum() == 1
    assert np.asarray(slots.in_prompt[2, 1])
    slots = start(slots, jnp.int32(NUM_SLOTS), pad([5], 20), pad([5], 20))
    assert np.asarray(slots.in_prompt).sum() == 1
    assert np.asarray(slots.output_counts).sum() == 20 * (NUM_SLOTS - 1)


def test_penalty_changes_with_what_was_generated():
    slots = make_slots(10)
    logits = jnp.asarray([[0, 0, 1, 0.9, 0, 0, 0, 0, 0, 0]], jnp.float32)
    inputs = make_inputs(1, 10, frequency_penalty=0.5)
    tokens = []
    for _ in range(4):
        output, slots = run(logits, slots, jnp.asarray([3]), inputs)
        tokens.append(int(output.tokens[0]))
    assert tokens == [2, 3, 2, 3]


def test_a_row_may_be_asked_for_the_log_probability_of_another_token_than_it_draws():
    logits = np.random.default_rng(3).normal(size=(3, 50)).astype(np.float32)
    inputs = make_inputs(3, 50, scored=[7, 50, 49], logprobs=True)
    output, slots = run(jnp.asarray(logits), make_slots(50), jnp.arange(3, dtype=jnp.int32), inputs)
    drawn = logits.argmax(-1)
    np.testing.assert_array_equal(output.tokens, drawn)
    np.testing.assert_array_equal(slots.last_tokens[:3], drawn)
    expected = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(output.logprobs, expected[np.arange(3), [7, drawn[1], 49]], atol=1e-5)


def test_logprobs_are_of_the_raw_logits():
    rng = np.random.default_rng(9)
    logits = rng.standard_normal((4, 50)).astype(np.float32) * 3
    inputs = make_inputs(4, 50, temperature=0.5, top_k=2, bias=[[(1, 3.0)]] * 4, logprobs=True)
    output, _ = run(jnp.asarray(logits), make_slots(50), jnp.full(4, NUM_SLOTS), inputs)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    tokens = np.asarray(output.tokens)
    np.testing.assert_allclose(output.logprobs, expected[np.arange(4), tokens], atol=1e-5)
    order = np.argsort(-expected, axis=-1)[:, :MAX_TOP_LOGPROBS]
    np.testing.assert_array_equal(output.top_ids, order)
    np.testing.assert_allclose(output.top_logprobs, np.take_along_axis(expected, order, 1), atol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("given", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_poisoned_logits_stay_in_range(given, poison):
    logits = np.full((3, 200), poison, np.float32)
    logits[1, :] = 0
    logits[1, 7] = poison
    logits[2, 11] = 5
    inputs = make_inputs(3, 200, top_p=0.9, min_p=0.1, logprobs=True, repetition_penalty=1.1, **given)
    output, slots = run(jnp.asarray(logits), make_slots(200), jnp.arange(3), inputs)
    tokens = np.asarray(slots.last_tokens)[:3]
    assert ((tokens >= 0) & (tokens < 200)).all()
    if not poison > 0:
        assert tokens[2] == 11
        assert tokens[1] != 7
    assert np.asarray(output.tokens).tolist() == [-1] * 3, "none of them is served"


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_one_poisoned_logit_spoils_its_row_only(poison):
    logits = np.random.default_rng(3).standard_normal((4, 300)).astype(np.float32)
    good = pick(logits, make_inputs(4, 300, temperature=0.0))
    logits[2, 299 if poison < 0 else 17] = poison
    found = pick(logits, make_inputs(4, 300, temperature=0.0))
    assert found.tolist() == [*good[:2], -1, good[3]]


def test_slots_are_updated_in_place():
    """No temporary is as large as the counts: greedy batches do not pay for penalties."""
    num_slots, vocab = 512, 512
    slots = make_slots(vocab, num_slots)
    args = (jnp.zeros((2, vocab)), slots, jnp.zeros(2, jnp.int32), make_inputs(2, vocab))
    memory = jax.jit(sample, donate_argnums=1).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < num_slots * vocab
    assert memory.alias_size_in_bytes >= 5 * num_slots * vocab
