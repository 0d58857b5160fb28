"""The definition of paged attention against loops in numpy, and against PyTorch's attention."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from engine_core.kernels.paged_attention import reference
from engine_core.kernels.paged_attention.rows import quantized
from tests.engine_core.kernels.cases import FAST_COMPILE, FEATURES, Case, make_arrays


def sequences(case, arrays, cache):
    """Per sequence row: its token rows, and keys and values [n, K, H] f64 in units of the cache, read from `cache`."""
    table = np.asarray(arrays.rows.page_table)
    begins = np.asarray(arrays.rows.cu_q_lens)
    heads = np.asarray(cache, np.float32)[case.layer].astype(np.float64)
    heads = heads.reshape(*heads.shape[:2], -1, heads.shape[-1])[:, :, : 2 * case.kv_heads, : case.head_dim]
    for row, kv_len in enumerate(case.kv_lens):
        places = np.arange(kv_len)
        pages = np.minimum(table[row][places // case.page_size], heads.shape[0] - 1)
        stored = heads[pages, places % case.page_size]
        yield range(begins[row], begins[row + 1]), stored[:, ::2], stored[:, 1::2]


def numpy_attention(case, arrays, cache):
    """[T, N, H] f64, score by score."""
    q = np.asarray(arrays.q, np.float64)
    out = np.zeros(q.shape)
    sinks = None if arrays.scoring.sinks is None else np.asarray(arrays.scoring.sinks, np.float64)
    k_scale, v_scale = case.scales or (1.0, 1.0)
    for tokens, keys, values in sequences(case, arrays, cache):
        context = len(keys) - len(tokens)
        for number, token in enumerate(tokens):
            position = context + number
            seen = [p for p in range(position + 1) if not case.window or p > position - case.window]
            if case.tree:
                mask = np.asarray(arrays.scoring.custom_mask)[token]
                seen = [p for p in seen if p < context or mask[p - context]]
            for head in range(case.heads):
                kv_head = head // (case.heads // case.kv_heads)
                scores = keys[seen, kv_head] @ q[token, head] * case.head_dim**-0.5 * k_scale
                if case.soft_cap:
                    scores = case.soft_cap * np.tanh(scores / case.soft_cap)
                weights = np.exp(scores)
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
                out[token, head] = weights @ values[seen, kv_head] * v_scale / total
    return out


def define(case, arrays):
    attend = functools.partial(reference.paged_attention, rows=arrays.rows, scoring=arrays.scoring)
    attend = jax.jit(attend, compiler_options=FAST_COMPILE)
    return attend(arrays.q, arrays.k, arrays.v, arrays.cache, case.layer)


@pytest.mark.parametrize("name", [*FEATURES, "none"])
def test_against_numpy(name):
    case = Case(**{"dtype": "float32", **FEATURES.get(name, {})})
    arrays = make_arrays(case, 0)
    out, cache = define(case, arrays)
    tolerance = 1e-5 if case.dtype == "float32" else 1e-2
    np.testing.assert_allclose(out, numpy_attention(case, arrays, cache), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["none", "int8", "e4m3", "page64"])
def test_every_new_token_is_in_the_cache_and_nothing_else_changed(name):
    case = Case(**FEATURES.get(name, {}))
    arrays = make_arrays(case, 0)
    _, cache = define(case, arrays)
    changed = np.ones(cache.shape[:3], bool)
    for row, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        for number, position in enumerate(range(kv_len - q_len, kv_len)):
            page = arrays.rows.page_table[row, position // case.page_size]
            token = arrays.rows.cu_q_lens[row] + number
            stored = np.asarray(cache[case.layer, page, position % case.page_size], np.float32)
            for side, array, scale in ((0, arrays.k, 0), (1, arrays.v, 1)):
                expected = quantized(array[token], None if case.scales is None else case.scales[scale], cache.dtype)
                expected = np.asarray(expected.astype(cache.dtype), np.float32)
                np.testing.assert_array_equal(stored.reshape(-1, stored.shape[-1])[side::2], expected)
            changed[case.layer, page, position % case.page_size] = False
    before, after = (np.asarray(array, np.float32)[changed] for array in (arrays.cache, cache))
    np.testing.assert_array_equal(before, after)


def test_quantized_values_are_rounded_and_clipped():
    values = np.array([0.24, 0.26, -1000, 1000, -0.5], np.float32)
    np.testing.assert_array_equal(quantized(values, 0.5, np.int8), [0, 1, -128, 127, -1])
    clipped = np.asarray(quantized(np.array([1e6, -1e6], np.float32), None, np.dtype("float8_e4m3fn")), np.float32)
    np.testing.assert_array_equal(clipped, [448, -448])


@pytest.mark.torch
def test_against_torch():
    torch = pytest.importorskip("torch")
    case = Case(
        q_lens=(9, 40), kv_lens=(31, 40), heads=6, kv_heads=2, dtype="float32", cache_dtype="float32", tree=True
    )
    arrays = make_arrays(case, 3)
    out, cache = define(case, arrays)
    for (tokens, keys, values), q_len in zip(sequences(case, arrays, cache), case.q_lens, strict=True):
        seen = np.ones((q_len, len(keys)), bool)
        seen[:, len(keys) - q_len :] = np.asarray(arrays.scoring.custom_mask)[list(tokens), :q_len]
        q, k, v = (
            torch.from_numpy(np.array(x, np.float32)).transpose(0, 1)
            for x in (arrays.q[tokens.start : tokens.stop], keys, values)
        )
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.from_numpy(seen), enable_gqa=True
        )
        np.testing.assert_allclose(out[tokens.start : tokens.stop], expected.transpose(0, 1), atol=1e-5)
