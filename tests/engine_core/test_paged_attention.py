"""Paged attention: the reference against numpy, XLA against the reference, bit equality of decode."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine_core.kernels.paged_attention import ragged_paged_attention, write_kv
from engine_core.kv_cache import CacheLayout, create_cache

PAGE = 16
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


@dataclass
class Case:
    """A filled cache whose unused places are NaN, and ragged queries over it."""

    q: jax.Array
    cache: jax.Array
    kv_lens: jax.Array
    page_table: jax.Array
    cu_q_lens: jax.Array
    k: list[np.ndarray]
    v: list[np.ndarray]

    def attend(self, implementation="auto", window=0, rows=None):
        order = slice(None) if rows is None else jnp.asarray(rows)
        q = self.q if rows is None else self.q[order]
        return np.asarray(
            attend(q, self.cache, self.kv_lens[order], self.page_table[order], self.cu_q_lens, window, implementation)
        )


@jax.jit(static_argnames="implementation")
def attend(q, cache, kv_lens, page_table, cu_q_lens, window, implementation):
    return ragged_paged_attention(
        q, cache, kv_lens, page_table, cu_q_lens, scale=0.3, window=window, implementation=implementation
    )


def make_case(q_lens, kv_lens, *, heads=(4, 2, 8), dtype="float32", page_size=PAGE, padding=0, table=0, seed=0):
    """Rows of these lengths; `padding` more token rows; page ids shuffled, out of range where unused."""
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads, head_dim = heads
    used = [-(-n // page_size) for n in kv_lens]
    width = max([table, 1, *used])
    num_pages = sum(used) + 2
    layout = CacheLayout(
        num_layers=1, num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype, head_align=1,
    )  # fmt: skip
    cache = create_cache(layout, None, stacked=False).layers[0]
    cache = jnp.full_like(cache, 0x7FC0 if cache.dtype == jnp.uint16 else jnp.nan)
    ids = rng.permutation(num_pages - 1)  # the last page stays NaN: out-of-range ids are clipped to it
    page_table = np.full((len(kv_lens), width), num_pages, np.int32)
    ks, vs = [], []
    for row, n in enumerate(kv_lens):
        page_table[row, : used[row]], ids = ids[: used[row]], ids[used[row] :]
        k, v = (jnp.asarray(rng.standard_normal((n, num_kv_heads, head_dim)), dtype) for _ in range(2))
        places = np.arange(n)
        cache = write_kv(cache, k, v, jnp.asarray(page_table[row][places // page_size]), places % page_size)
        ks.append(np.asarray(k, np.float32))
        vs.append(np.asarray(v, np.float32))
    q = jnp.asarray(rng.standard_normal((sum(q_lens) + padding, num_heads, head_dim)), dtype)
    cu_q_lens = jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32)
    return Case(q, cache, jnp.asarray(kv_lens, jnp.int32), jnp.asarray(page_table), cu_q_lens, ks, vs)


def numpy_attention(case: Case, q_lens, kv_lens, window=0):
    """Softmax attention, loop by loop, in float64."""
    out = np.zeros(case.q.shape, np.float64)
    token = 0
    for row, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        for j in range(q_len):
            end = kv_len - q_len + j + 1
            start = max(0, end - window) if window else 0
            for head in range(case.q.shape[1]):
                kv_head = head // (case.q.shape[1] // case.k[row].shape[1])
                query = np.asarray(case.q[token, head], np.float64)
                scores = 0.3 * case.k[row][start:end, kv_head].astype(np.float64) @ query
                weights = np.exp(scores - scores.max())
                out[token, head] = weights / weights.sum() @ case.v[row][start:end, kv_head]
            token += 1
    return out


RAGGED = [
    ([3, 1, 5], [3, 1, 40]),
    ([1, 15, 16, 17], [1, 15, 16, 17]),
    ([16, 0, 33], [32, 0, 33]),
    ([1, 1, 60], [130, 127, 200]),
    ([129], [300]),
]


@pytest.mark.parametrize("window", [0, 1, 7, 130])
@pytest.mark.parametrize(("q_lens", "kv_lens"), RAGGED)
def test_reference_against_numpy(q_lens, kv_lens, window):
    case = make_case(q_lens, kv_lens, padding=3)
    expected = numpy_attention(case, q_lens, kv_lens, window)
    np.testing.assert_allclose(case.attend("reference", window), expected, atol=2e-6)


@pytest.mark.parametrize("window", [0, 1, 7, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("q_lens", "kv_lens"), RAGGED)
def test_prefill_against_reference(q_lens, kv_lens, dtype, window):
    case = make_case(q_lens, kv_lens, dtype=dtype, padding=3)
    out = case.attend("xla", window)
    assert out.dtype == case.q.dtype
    expected = case.attend("reference", window).astype(np.float32)
    np.testing.assert_allclose(out.astype(np.float32), expected, atol=TOLERANCE[dtype])
    assert not out[sum(q_lens) :].any(), "padding rows are zero"


DECODE_LENS = [1, 15, 16, 17, 0, 127, 128, 129, 300, 0]


@pytest.mark.parametrize("window", [0, 1, 7, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_against_reference(dtype, window):
    case = make_case([1] * len(DECODE_LENS), DECODE_LENS, dtype=dtype)
    out = case.attend("xla", window)
    expected = case.attend("reference", window).astype(np.float32)
    np.testing.assert_allclose(out.astype(np.float32), expected, atol=TOLERANCE[dtype])
    assert not out[[4, 9]].any(), "padding rows are zero"


def test_decode_rows_are_bitwise_independent_of_row_and_neighbours():
    lens = [1, 15, 16, 17, 127, 128, 129, 300]
    case = make_case([1] * 8, lens, heads=(4, 2, 16))
    out = case.attend("xla")
    rng = np.random.default_rng(1)
    for rows in (rng.permutation(8), rng.permutation(8), [2] * 8, [0, 0, 0, 0, 3, 0, 0, 7]):
        np.testing.assert_array_equal(case.attend("xla", rows=rows), out[np.asarray(rows)])


def test_strict_prefill_as_decode_rows():
    """One sequence, all KV written, each row one token further: equal bits to decoding each row among others."""
    n = 40
    case = make_case([1], [n])
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.standard_normal((n, 4, 8)), jnp.float32)
    lens = jnp.arange(1, n + 1)
    table = jnp.tile(case.page_table, (n, 1))
    chunk = np.asarray(attend(q, case.cache, lens, table, jnp.arange(n + 1), 0, "xla"))
    whole = np.asarray(attend(q, case.cache, jnp.asarray([n]), table[:1], jnp.asarray([0, n]), 0, "reference"))
    np.testing.assert_allclose(chunk, whole, atol=2e-6)
    order = rng.permutation(n)
    again = np.asarray(attend(q[order], case.cache, lens[order], table, jnp.arange(n + 1), 0, "xla"))
    np.testing.assert_array_equal(again, chunk[order])
