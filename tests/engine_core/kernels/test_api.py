"""The op's face: mixed steps, layers, what is refused, tile sizes."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine_core.errors import ConfigError
from engine_core.kernels.paged_attention import TuningKey, check_supported, paged_attention, tuned
from engine_core.kernels.paged_attention.tpu_decode import DecodeTiles
from engine_core.kernels.paged_attention.tpu_prefill import PrefillTiles
from tests.engine_core.kernels.cases import FAST_COMPILE, Case, make_arrays

KEY = TuningKey(
    op="prefill",
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    cache_dtype="bfloat16",
    page_size=128,
)


def run(case, implementation, seed=0):
    arrays = make_arrays(case, seed)
    op = functools.partial(paged_attention, rows=arrays.rows, scoring=arrays.scoring, implementation=implementation)
    out, cache = jax.jit(op, compiler_options=FAST_COMPILE)(arrays.q, arrays.k, arrays.v, arrays.cache, case.layer)
    return np.asarray(out, np.float32), np.asarray(cache, np.float32)


@pytest.mark.parametrize(
    "case",
    [
        Case(q_lens=(1, 1, 1, 17, 3), kv_lens=(5, 130, 1, 17, 140), num_decode=3, sinks=True, window=100, tree=True),
        pytest.param(Case(q_lens=(1, 1), kv_lens=(5, 130), num_decode=2), marks=pytest.mark.slow),
        pytest.param(
            Case(q_lens=(1, 1, 0), kv_lens=(129, 16, 0), padding=1, soft_cap=5.0, tree=True), marks=pytest.mark.slow
        ),
    ],
    ids=["mixed", "only decode rows", "decode"],
)
@pytest.mark.usefixtures("small_tiles")
def test_every_row_by_its_kernel(case):
    out, cache = run(case, "tpu_interpreted")
    expected, expected_cache = run(case, "reference")
    np.testing.assert_allclose(out, expected, atol=1e-2, rtol=1e-2)
    np.testing.assert_array_equal(cache, expected_cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_against_reference(dtype):
    """Writes and attends in the right layer."""
    case = Case(dtype=dtype, cache_dtype=dtype, layers=3, layer=1)
    out, cache = run(case, "xla")
    expected, expected_cache = run(case, "reference")
    np.testing.assert_allclose(out, expected, atol=1e-2 if dtype == "bfloat16" else 1e-5)
    np.testing.assert_array_equal(cache, expected_cache)


@pytest.mark.parametrize(
    ("feature", "value"),
    [("soft_cap", 5.0), ("sinks", True), ("tree", True), ("scales", (0.1, 0.1))],
)
def test_xla_refuses_what_it_lacks(feature, value):
    name = {"tree": "custom_mask", "scales": "k_scale"}.get(feature, feature)
    with pytest.raises(ValueError, match=f"XLA has no {name}"):
        run(Case(**{feature: value}), "xla")


def test_shapes_are_checked():
    case = Case(sinks=True)
    arrays = make_arrays(case, 0)
    args = (arrays.q, arrays.k, arrays.v, arrays.cache, 0)
    for rows, scoring, message in [
        (replace(arrays.rows, offsets=arrays.rows.offsets[1:]), arrays.scoring, r"\[T\]: T is 23 but was 24"),
        (replace(arrays.rows, cu_q_lens=arrays.rows.kv_lens), arrays.scoring, r"\[B \+ 1\]"),
        (arrays.rows, replace(arrays.scoring, sinks=jnp.zeros(3)), r"\[N\]: N is 3 but was 4"),
        (arrays.rows, replace(arrays.scoring, custom_mask=jnp.ones((2, 3), bool)), r"\[T M\]: T is 2 but was 24"),
    ]:
        with pytest.raises(ValueError, match=message):
            paged_attention(*args, rows, scoring, "auto")


@pytest.mark.parametrize(
    ("change", "device_kind", "entries", "message"),
    [
        ({}, "TPU v4", 10, "TPU generation TPU v4 is not supported; supported: TPU v5 lite"),
        ({"head_dim": 96}, "TPU7x", 10, "head_dim 96 is not supported; supported: 64, 128, 256"),
        ({"page_size": 8}, "TPU7x", 10, "page_size 8"),
        ({"dtype": "float16"}, "TPU7x", 10, "dtype float16"),
        ({"cache_dtype": "int4"}, "TPU7x", 10, "cache dtype int4"),
        ({"num_heads": 30}, "TPU7x", 10, "30 query heads are no multiple of 8"),
        ({}, "TPU7x", 128 * 2048, "a page table of 262144 ids does not fit"),
    ],
)
def test_unsupported_combinations_are_refused(change, device_kind, entries, message):
    check_supported(KEY, "TPU v6 lite", 1000)
    with pytest.raises(ConfigError, match=message):
        check_supported(replace(KEY, **change), device_kind, entries)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_tiles_by_rule_fit(kv_heads, page_size, caplog):
    key = replace(KEY, num_kv_heads=kv_heads, num_heads=kv_heads * 4, page_size=page_size)
    with caplog.at_level(logging.INFO):
        tiles = tuned.prefill_tiles(key, f"machine {kv_heads} {page_size}")
        assert tuned.prefill_tiles(key, f"machine {kv_heads} {page_size}") == tiles
    assert len(caplog.records) == 1, "a miss is said once"
    assert tiles.tile_kv % page_size == 0 and tiles.tile_q % tiles.lanes == 0 and kv_heads % tiles.body_heads == 0
    decode = tuned.decode_tiles(replace(key, op="decode"), "none")
    assert decode.tile_kv % page_size == 0 and decode.tile_kv > 0


def test_tuned_files_are_well_formed():
    """Every entry is a key and tiles that the kernels take, and says how it was found."""
    for path in tuned._FOLDER.glob("*.json"):
        for entry in json.loads(path.read_text()):
            assert entry.keys() == {"key", "tiles", "found"}, path
            key = TuningKey(**entry["key"])
            kind = {"prefill": PrefillTiles, "decode": DecodeTiles}[key.op]
            kind(**entry["tiles"])
            assert tuned.find(key, path.stem) == entry["tiles"]
