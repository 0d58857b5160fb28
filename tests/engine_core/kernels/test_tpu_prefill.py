"""The prefill kernel, run by the TPU interpreter with race detection, against the definition.

Unused pages, unused places and the memory of the machine hold NaN. The definition is tested against numpy in
`test_reference`.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from engine_core.kernels.paged_attention import reference, tpu_prefill
from tests.engine_core.kernels.cases import FAST_COMPILE, FEATURES, TILES, Case, make_arrays

TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}
INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def run(case, seed=0):
    """(kernel's output, expected, kernel's cache, expected) as numpy."""
    arrays = make_arrays(case, seed)
    fixed = {"rows": arrays.rows, "scoring": arrays.scoring}
    args = (arrays.q, arrays.k, arrays.v, arrays.cache, case.layer)
    prefill = functools.partial(tpu_prefill.prefill, tiles=case.tiles, interpret=INTERPRET, **fixed)
    out, written = jax.jit(prefill, compiler_options=FAST_COMPILE)(*args)
    define = functools.partial(reference.paged_attention, **fixed)
    expected, expected_cache = jax.jit(define, compiler_options=FAST_COMPILE)(*args)
    begin = sum(case.q_lens[: case.num_decode or 0])
    return (
        np.asarray(out, np.float32)[begin:],
        np.asarray(expected, np.float32)[begin:],
        np.asarray(written, np.float32),
        np.asarray(expected_cache, np.float32),
    )


def check(case, seed=0):
    out, expected, written, expected_cache = run(case, seed)
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)
    assert not out[sum(case.q_lens[case.num_decode or 0 :]) :].any(), "padding rows are zero"
    if case.num_decode is None:
        np.testing.assert_array_equal(written, expected_cache)


@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ((0, 0), (0, 0)),
        ((1,), (1,)),
        ((15, 16, 17, 1, 0), (15, 16, 17, 256, 0)),
        ((127, 128), (127, 256)),
        ((129, 1, 2), (300, 1, 129)),
        ((0, 0, 260, 0, 5, 0), (0, 0, 260, 0, 389, 0)),
    ],
)
def test_lengths(q_lens, kv_lens):
    check(Case(q_lens=q_lens, kv_lens=kv_lens))


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name):
    check(Case(**FEATURES[name]))


@pytest.mark.parametrize("page_size", [32, 128, 256])
def test_page_sizes(page_size):
    """Of one token less than a page, a whole one, one more, and a page table without a spare column."""
    lengths = (page_size - 1, page_size, page_size + 1)
    tiles = replace(TILES, tile_kv=max(128, page_size))
    check(Case(q_lens=(5, 2, 1), kv_lens=lengths, page_size=page_size, tiles=tiles, spare_columns=0))


def test_one_token_window():
    check(Case(window=1))


# Every two features that do not exclude each other occur together in one of these.
TOGETHER = [
    "window soft_cap sinks tree float32 head64 mqa page64 padding",
    "wide_q window sinks int8 head256 mha padding skip",
    "soft_cap tree int8 head64 mqa page64 skip",
    "window tree e4m3 head256 mqa page64 skip",
    "wide_q soft_cap sinks e4m3 head64 mha padding",
    "window soft_cap e5m2 head64 mha page64 skip padding",
    "wide_q sinks tree e5m2 head256 mqa",
    "wide_q window soft_cap sinks head256 mha page64",
    "wide_q tree head64 mqa padding skip",
    "float32 soft_cap head256 mha skip",
    "window soft_cap sinks tree head256 mha page64 int8 padding",
]


@pytest.mark.parametrize("names", TOGETHER)
def test_features_together(names):
    features = {}
    for name in names.split():
        features |= FEATURES[name]
    check(Case(**features), seed=1)


def test_every_pair_of_features_is_tested():
    """Unless both set the same field."""
    tested = {pair for names in TOGETHER for pair in itertools.combinations(sorted(names.split()), 2)}
    for pair in itertools.combinations(sorted(FEATURES), 2):
        first, second = (FEATURES[name] for name in pair)
        assert pair in tested or first.keys() & second.keys(), pair


@pytest.mark.parametrize(
    "tiles",
    [
        {"tile_q": 256, "lanes": 128},
        {"tile_q": 256, "lanes": 256, "tile_kv": 256, "sub_kv": 128, "lookahead": 2, "body_heads": 2},
        {"lookahead": 0, "sub_kv": 128},
    ],
)
def test_tiles(tiles):
    """Long queries: large tiles, whole tiles, tiles of two sequences in flight."""
    check(Case(q_lens=(260, 20), kv_lens=(600, 300), tiles=replace(TILES, **tiles)))


def test_bad_input_is_refused():
    case = Case(q_lens=(1,), kv_lens=(1,))
    for changes, message in [
        ({"heads": 3}, "q has 3 heads, not a multiple of the 2 KV heads"),
        ({"tiles": replace(TILES, tile_kv=24)}, "tile_kv 24 does not fit pages of 16"),
        ({"tiles": replace(TILES, lanes=100)}, "lanes 100"),
        ({"tiles": replace(TILES, body_heads=3)}, "body_heads 3 does not divide 2 KV heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(replace(case, **changes))
