"""The decode kernel, run by the TPU interpreter with race detection, against attention written in numpy.

Unused pages, unused places and the memory of the machine hold NaN.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine_core.kernels.paged_attention import kv_words, tpu_decode
from tests.engine_core.kernels.cases import FAST_COMPILE

DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "int8": np.int8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the kernel."""

    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    q_dtype: str = "bfloat16"
    tile_kv: int = 128
    group: int = 2
    num_buffers: int = 3
    window: int = 0
    soft_cap: float | None = None
    sinks: bool = False
    scales: tuple[float, float] | None = None
    num_decode: int | None = None
    layers: int = 2
    layer: int = 1
    spare_columns: int = 2


def reference(case, q, ks, vs, sinks):
    """[B, N, H] f32 over each row's own keys and values [n, K, H]."""
    out = np.zeros(q.shape, np.float32)
    decode_rows = len(case.lengths) if case.num_decode is None else case.num_decode
    for row, n in enumerate(case.lengths[:decode_rows]):
        if not n:
            continue
        begin = max(0, n - case.window) if case.window else 0
        for head in range(case.heads):
            kv_head = head // (case.heads // case.kv_heads)
            scores = ks[row][begin:, kv_head] @ q[row, head] * case.head_dim**-0.5
            if case.soft_cap:
                scores = case.soft_cap * np.tanh(scores / case.soft_cap)
            top = max(scores.max(), sinks[head] if case.sinks else -np.inf)
            weights = np.exp(scores - top)
            total = weights.sum() + (np.exp(sinks[head] - top) if case.sinks else 0)
            out[row, head] = weights @ vs[row][begin:, kv_head] / total
    return out


def run(case, like=None):
    """The kernel's output and the expected one, the cache after it and the expected one.

    Rows of length `like` get the same query, keys and values in every case.
    """
    rng = np.random.default_rng(0)
    storage, rows, page = DTYPES[case.dtype], len(case.lengths), case.page_size
    pack = 4 // np.dtype(storage).itemsize
    words = -(-2 * case.kv_heads // pack)
    width = -(-case.head_dim // 128) * 128
    used = [-(-n // page) for n in case.lengths]
    num_pages = sum(used) + 3
    nan = 127 if case.dtype == "int8" else np.nan
    cache = np.full((case.layers * num_pages, page, words * pack, width), nan).astype(storage)
    ids = rng.permutation(num_pages)
    table = np.full((rows, max([*used, 1]) + case.spare_columns), 2**30, np.int32)
    k_scale, v_scale = case.scales or (1.0, 1.0)
    ks, vs = [], []
    q = np.zeros((rows, case.heads, case.head_dim), np.float32)
    new_k = np.zeros((rows, case.kv_heads, case.head_dim), np.float32)
    new_v = np.zeros_like(new_k)
    expected_cache = cache.copy()
    for row, n in enumerate(case.lengths):
        table[row, : used[row]], ids = ids[: used[row]], ids[used[row] :]
        source = np.random.default_rng(7) if n == like else rng
        k, v = source.normal(size=(2, n, case.kv_heads, case.head_dim)).astype(np.float32)
        q[row] = source.normal(size=q.shape[1:])
        stored = np.zeros((n, words * pack, width), np.float32)
        for side, (values, scale) in enumerate(((k, k_scale), (v, v_scale))):
            values /= scale
            if case.dtype == "int8":
                values[:] = np.clip(np.round(values), -128, 127)
            stored[:, side : 2 * case.kv_heads : 2, : case.head_dim] = values
        stored = stored.astype(storage)
        ks.append(stored[:, 0 : 2 * case.kv_heads : 2, : case.head_dim].astype(np.float32) * k_scale)
        vs.append(stored[:, 1 : 2 * case.kv_heads : 2, : case.head_dim].astype(np.float32) * v_scale)
        for at in range(n):
            place = case.layer * num_pages + table[row, at // page], at % page
            expected_cache[place] = stored[at]
            if at < n - 1 or (case.num_decode is not None and row >= case.num_decode):
                cache[place] = stored[at]
        if n:
            new_k[row], new_v[row] = ks[row][-1], vs[row][-1]
    q = np.asarray(jnp.asarray(q, case.q_dtype))
    sinks = rng.normal(size=case.heads).astype(np.float32) * 2
    shape = (case.layers * num_pages, page, words, pack, width)
    decode = functools.partial(
        tpu_decode.decode,
        scale=case.head_dim**-0.5,
        window=jnp.asarray([case.window], jnp.int32) if case.window else 0,
        soft_cap=case.soft_cap,
        tiles=tpu_decode.DecodeTiles(tile_kv=case.tile_kv, group=case.group, num_buffers=case.num_buffers),
        interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"),
    )
    out, after = jax.jit(decode, compiler_options=FAST_COMPILE)(
        jnp.asarray(q),
        jnp.asarray(new_k, case.q_dtype),
        jnp.asarray(new_v, case.q_dtype),
        jnp.asarray(cache).reshape(shape),
        jnp.asarray([case.layer * num_pages], jnp.int32),
        jnp.asarray(case.lengths, jnp.int32),
        jnp.asarray(table),
        jnp.asarray([rows if case.num_decode is None else case.num_decode], jnp.int32),
        jnp.asarray(sinks) if case.sinks else None,
        *(case.scales or (None, None)),
    )
    expected = reference(case, q.astype(np.float32), ks, vs, sinks)
    after = np.asarray(after.reshape(expected_cache.shape))
    return np.asarray(out, np.float32), expected, after, expected_cache


def check(case):
    out, expected, after, expected_cache = run(case)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, expected, atol=TOLERANCE[case.q_dtype], rtol=TOLERANCE[case.q_dtype])
    bits = f"u{after.dtype.itemsize}"
    same = after.view(bits) == expected_cache.view(bits)
    assert same.all()


LENGTHS = (1, 0, 15, 16, 17, 0, 129, 128, 300, 2, 0)
SHORT = (17, 0, 130)
FEATURES = {
    "plain": {},
    "window": {"window": 100},
    "soft_cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "int8": {"dtype": "int8", "scales": (0.03, 0.02)},
    "fp8": {"dtype": "float8_e4m3fn", "scales": (0.5, 2.0)},
    "f32": {"dtype": "float32", "q_dtype": "float32"},
}
SHAPES = {
    "mqa": {"kv_heads": 1, "heads": 8, "tile_kv": 256},
    "mqa_fp8": {"kv_heads": 1, "heads": 4, "dtype": "float8_e5m2", "scales": (1.0, 1.0)},
    "mha": {"kv_heads": 4, "heads": 4, "tile_kv": 64},
    "three_kv_heads": {"kv_heads": 3, "heads": 9, "tile_kv": 256},
    "three_kv_heads_int8": {"kv_heads": 3, "heads": 3, "tile_kv": 128, "dtype": "int8", "scales": (0.03, 0.03)},
    "many_heads": {"kv_heads": 8, "heads": 32, "tile_kv": 64},
    "head_dim_64": {"head_dim": 64},
    "head_dim_256": {"head_dim": 256},
    "head_dim_256_f32": {"head_dim": 256, "dtype": "float32", "q_dtype": "float32"},
    "page_32": {"page_size": 32},
    "page_64": {"page_size": 64, "dtype": "float8_e4m3fn", "scales": (0.5, 2.0)},
    "page_128": {"page_size": 128},
    "page_256": {"page_size": 256, "tile_kv": 256},
    "one_layer": {"layers": 1, "layer": 0},
}


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name):
    check(Case(lengths=LENGTHS, **FEATURES[name]))


PAIRED = {
    **{name: change for name, change in FEATURES.items() if name != "plain"},
    "mqa": {"kv_heads": 1, "heads": 8},
    "mha": {"kv_heads": 3, "heads": 3},
    "head_dim_64": {"head_dim": 64},
    "head_dim_256": {"head_dim": 256},
    "page_64": {"page_size": 64},
    "page_256": {"page_size": 256},
    "skip": {"num_decode": 3},
}
# Every two features that do not exclude each other occur together in one of these.
TOGETHER = [
    "window soft_cap sinks f32 mha head_dim_256 page_64 skip",
    "window soft_cap sinks fp8 mqa head_dim_64 page_256 skip",
    "window soft_cap sinks int8 mqa head_dim_256 page_64 skip",
    "window soft_cap sinks int8 mha head_dim_64 page_256 skip",
    "window soft_cap sinks f32 mqa head_dim_256 page_256 skip",
    "window soft_cap sinks f32 mqa head_dim_64 page_64 skip",
    "window soft_cap sinks fp8 mha head_dim_256 page_64 skip",
]


@pytest.mark.parametrize("names", TOGETHER)
def test_features_together(names):
    features = {}
    for name in names.split():
        features |= PAIRED[name]
    check(Case(lengths=(16, 0, 150, 300), group=1, tile_kv=256, **features))


def test_every_pair_of_features_is_tested():
    """Unless both set the same field."""
    tested = {pair for names in TOGETHER for pair in itertools.combinations(sorted(names.split()), 2)}
    for pair in itertools.combinations(sorted(PAIRED), 2):
        first, second = (PAIRED[name] for name in pair)
        assert pair in tested or first.keys() & second.keys(), pair


def test_a_full_page_table():
    check(Case(lengths=(256, 17, 255), group=1, spare_columns=0))


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name):
    check(Case(lengths=SHORT, group=1, **SHAPES[name]))


def test_every_row_is_padding():
    check(Case(lengths=(0, 0)))


def test_rows_beyond_num_decode_are_left_alone():
    check(Case(lengths=(20, 0, 33, 40), num_decode=3))


def test_more_groups_than_the_ring_holds():
    check(Case(lengths=(700, 5, 256, 129), group=1, num_buffers=3))
    check(Case(lengths=(100, 5, 256, 129, 0, 64, 128, 1), group=3, num_buffers=4))


def test_a_row_does_not_depend_on_its_neighbours_nor_its_place():
    """The same sequence alone and last of three, whose items it then follows in one group, bit for bit."""
    alone, together = (run(Case(lengths=lengths), like=300)[0] for lengths in ((300,), (17, 129, 300)))
    np.testing.assert_array_equal(alone[0], together[2])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tile_kv": 120}, "tile_kv 120 is not a multiple of page_size 16"),
        ({"tile_kv": 144}, "tile_kv 144 is not a multiple of block_tokens 128"),
        ({"num_buffers": 2}, "num_buffers must be at least 3, not 2"),
        ({"heads": 3}, "3 heads do not divide by 2 KV heads"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run(Case(lengths=(4,), **change))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("side", [kv_words.KEY, kv_words.VALUE])
def test_every_byte_is_read_exactly(dtype, side):
    """Against ml_dtypes; what is not finite need not be."""
    layout = kv_words.WordLayout(kv_heads=2, words=1, pack=4, width=128)
    place = np.arange(layout.block_tokens * 4 * 128).reshape(layout.block_tokens, 4, 128)
    values = (place * 37 % 256).astype(np.uint8).view(DTYPES[dtype])

    def kernel(tokens, out):
        out[...] = kv_words.load(tokens, layout, 0, side, jnp.bfloat16, native=False)

    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((layout.block_rows, 128), jnp.bfloat16),
        interpret=pltpu.InterpretParams(),
    )(jnp.asarray(values[:, None]))
    expected = values[:, side::2].reshape(-1, 128).astype(np.float32)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(out, np.float32)[finite], expected[finite])


@pytest.mark.parametrize(
    "heads, page_size, expected",
    [
        (8, 128, (128, 8)),
        (2, 128, (512, 8)),
        (2, 16, (512, 8)),
        (1, 16, (1024, 8)),
        (3, 128, (256, 10)),
        (32, 256, (256, 1)),
    ],
)
def test_tiles_by_rule(heads, page_size, expected):
    layout = kv_words.WordLayout(kv_heads=heads, words=heads, pack=2, width=128)
    tiles = tpu_decode.choose_tiles(layout, page_size)
    assert (tiles.tile_kv, tiles.group) == expected
    assert tiles.tile_kv % page_size == tiles.tile_kv % layout.block_tokens == 0
