"""Heads of 64 side by side in rows of 128: the kernels over such a cache, against the definition over a padded one."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import pytest

from engine_core.kernels.paged_attention import paged_attention, side_by_side
from engine_core.kv_cache import join_heads, joined_heads, split_rows
from tests.engine_core.kernels.cases import FAST_COMPILE, FEATURES, Case, make_arrays

pytestmark = pytest.mark.usefixtures("small_tiles")
DECODE = {"q_lens": (1, 1, 1, 0), "kv_lens": (1, 17, 144, 0), "padding": 0}
PREFILL = {"q_lens": (3, 0, 17), "kv_lens": (3, 0, 140)}
HEADS = {
    "two": {},
    "mha": {"heads": 4, "kv_heads": 4},
    "grouped": {"heads": 12, "kv_heads": 6},
}


def joined(cache, num_kv_heads):
    """The same content with two heads in each row."""
    *dims, _, pack, _ = cache.shape
    heads = cache.reshape(*dims[:3], -1, 128)[:, :, :, : 2 * num_kv_heads, :64]
    rows = join_heads(heads, 2)
    return rows.reshape(*rows.shape[:3], -1, pack, 128)


def run(op, arrays, cache, layer):
    op = functools.partial(op, rows=arrays.rows, scoring=arrays.scoring)
    out, cache = jax.jit(op, compiler_options=FAST_COMPILE)(arrays.q, arrays.k, arrays.v, cache, layer)
    return np.asarray(out, np.float32), cache


def check(case, implementation="tpu_interpreted"):
    arrays = make_arrays(case, 0)
    expected, padded = run(functools.partial(paged_attention, implementation="reference"), arrays, arrays.cache, 1)
    cache = joined(arrays.cache, case.kv_heads)
    assert 2 * cache.size <= arrays.cache.size
    out, cache = run(functools.partial(paged_attention, implementation=implementation), arrays, cache, 1)
    tolerance = 1e-5 if case.dtype == "float32" else 1e-2
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)
    heads = split_rows(cache.reshape(*cache.shape[:3], -1, 128), 2)
    padded = padded.reshape(*padded.shape[:3], -1, 128)[..., : 2 * case.kv_heads, :64]
    np.testing.assert_array_equal(np.asarray(heads, np.float32), np.asarray(padded, np.float32))


@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("heads", HEADS)
def test_heads(rows, heads):
    check(Case(head_dim=64, **rows, **HEADS[heads]))


BYTES = {"heads": 8, "kv_heads": 4}  # four heads of bytes side by side two by two fill a word
ALONE = {
    "window": {},
    "soft_cap": {},
    "sinks": {},
    "float32": {},
    "int8": BYTES,
    "e4m3": BYTES,
    "page64": {},
}
TOGETHER = [
    "window soft_cap sinks int8 page64",
    "window sinks float32 page64 soft_cap",
    "e4m3 window soft_cap sinks page64",
]


@pytest.mark.parametrize("names", [*ALONE, *TOGETHER])
def test_features_of_decode(names):
    check(make_case(names, DECODE))


@pytest.mark.parametrize("names", [f"{names} tree" for names in TOGETHER])
def test_features_of_prefill(names):
    check(make_case(names, PREFILL))


def make_case(names, rows):
    features = dict(rows)
    for name in names.split():
        features |= ALONE.get(name, {}) | FEATURES[name]
    return Case(head_dim=64, **features)


def test_every_pair_of_features_is_tested():
    """Unless both set the same field."""
    tested = {pair for names in TOGETHER for pair in itertools.combinations(sorted(names.split()), 2)}
    for pair in itertools.combinations(sorted(ALONE), 2):
        first, second = (FEATURES[name] for name in pair)
        assert pair in tested or first.keys() & second.keys(), pair


def test_in_xla():
    check(Case(head_dim=64, **DECODE), "xla")
    check(Case(head_dim=64, **PREFILL), "xla")


def test_who_is_joined():
    assert joined_heads(8, 64, (128, 8, 1, 128)) == 2, "float32"
    assert joined_heads(8, 64, (128, 4, 2, 128)) == 2, "bfloat16"
    assert joined_heads(8, 32, (128, 2, 2, 128)) == 4
    assert joined_heads(8, 64, (128, 8, 2, 128)) == 1, "padded"
    assert joined_heads(8, 128, (128, 8, 2, 128)) == 1
    assert joined_heads(2, 64, (128, 1, 4, 128)) == 1, "bytes that fill no word"


def test_each_query_stands_in_its_heads_part():
    """Worked by hand: two rows of two KV heads of one element, two query heads for each."""
    q = np.arange(1.0, 9.0).reshape(1, 8, 1)
    k = np.arange(10.0, 14.0).reshape(1, 4, 1)
    queries, keys, values = side_by_side.join(q, k, k + 10, 2)
    assert np.asarray(queries)[0].tolist() == [[1, 0], [2, 0], [0, 3], [0, 4], [5, 0], [6, 0], [0, 7], [0, 8]]
    assert np.asarray(keys)[0].tolist() == [[10, 11], [12, 13]]
    assert np.asarray(values)[0].tolist() == [[20, 21], [22, 23]]
    np.testing.assert_array_equal(side_by_side.take(queries, 4, 2), q)
