"""Paged attention: the reference against numpy, XLA against the reference, bit equality of decode."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine_core.kernels.paged_attention import Rows, Scoring, paged_attention, write_kv, xla

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
        cu_q_lens = self.cu_q_lens if rows is None else jnp.arange(len(rows) + 1)
        return np.asarray(
            attend(q, self.cache, self.kv_lens[order], self.page_table[order], cu_q_lens, window, implementation)
        )


@jax.jit(static_argnames="implementation")
def attend(q, cache, kv_lens, page_table, cu_q_lens, window, implementation):
    """The cache is filled already: this step's keys and values are dropped."""
    dropped = jnp.full(q.shape[0], cache.shape[0])
    rows = Rows(
        page_ids=dropped,
        offsets=jnp.zeros_like(dropped),
        page_table=page_table,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        num_decode=None,
    )
    new = jnp.zeros((q.shape[0], cache.shape[2] * cache.shape[3] // 2, q.shape[2]), q.dtype)
    scoring = Scoring(scale=q.shape[2] ** -0.5, window=window)
    return paged_attention(q, new, new, cache[None], 0, rows, scoring, implementation)[0]


def make_case(
    q_lens,
    kv_lens,
    *,
    heads=(4, 2, 8),
    dtype="float32",
    cache_dtype=None,
    page_size=PAGE,
    padding=0,
    table=0,
    pages=0,
    seed=0,
):
    """Rows of these lengths, then `padding` token rows; page ids shuffled, out of range where unused."""
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads, head_dim = heads
    used = [-(-n // page_size) for n in kv_lens]
    width = max([table, 1, *used])
    num_pages = max(pages, sum(used) + 2)
    storage = jnp.dtype(cache_dtype or dtype)
    cache = np.full((num_pages, page_size, num_kv_heads, 2, head_dim), np.nan, storage)
    ids = rng.permutation(num_pages - 1)  # the last page stays NaN: out-of-range ids are clipped to it
    page_table = np.full((len(kv_lens), width), num_pages, np.int32)
    ks, vs = [], []
    for row, n in enumerate(kv_lens):
        page_table[row, : used[row]], ids = ids[: used[row]], ids[used[row] :]
        kv = rng.standard_normal((n, num_kv_heads, 2, head_dim)).astype(storage)
        cache[page_table[row][np.arange(n) // page_size], np.arange(n) % page_size] = kv
        ks.append(kv[:, :, 0].astype(np.float32))
        vs.append(kv[:, :, 1].astype(np.float32))
    pack = 4 // storage.itemsize
    cache = cache.view({1: np.float32, 2: np.uint16, 4: np.uint8}[pack])
    cache = jnp.asarray(cache.reshape(num_pages, page_size, -1, pack, head_dim))
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
                scores = case.q.shape[2] ** -0.5 * case.k[row][start:end, kv_head].astype(np.float64) @ query
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lens", [RAGGED[3], ([1, 1, 1], [1, 17, 130])], ids=["prefill", "decode"])
def test_float8_pages(lens, dtype):
    """They are read as the numbers they stand for, and the queries are not made float8."""
    case = make_case(*lens, heads=(8, 4, 8), dtype=dtype, cache_dtype="float8_e4m3fn")
    assert case.cache.dtype == jnp.uint8
    out = case.attend("xla", 7).astype(np.float32)
    np.testing.assert_allclose(out, numpy_attention(case, *lens, 7), atol=TOLERANCE[dtype])
    np.testing.assert_allclose(out, case.attend("reference", 7).astype(np.float32), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("storage", [jnp.uint8, jnp.float8_e4m3fn])
def test_float8_is_written_rounded_and_clipped(storage):
    cache = jnp.zeros((2, 4, 1, 4, 2), storage)
    k = jnp.asarray([[[448.0, 1e9], [-1e9, 1.0625]]])
    written = write_kv(cache, k, -k, jnp.asarray([1]), jnp.asarray([2]))
    found = np.asarray(written[1, 2]).view(jnp.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(found, [[[448, 448], [-448, -448], [-448, 1.0], [448, -1.0]]])
    assert not np.asarray(written).view(np.uint8)[0].any()


DECODE_LENS = [1, 15, 16, 17, 0, 127, 128, 129, 300, 0]


@pytest.mark.parametrize("window", [0, 1, 7, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_against_reference(dtype, window):
    case = make_case([1] * len(DECODE_LENS), DECODE_LENS, dtype=dtype)
    out = case.attend("xla", window)
    expected = case.attend("reference", window).astype(np.float32)
    np.testing.assert_allclose(out.astype(np.float32), expected, atol=TOLERANCE[dtype])
    assert not out[[4, 9]].any(), "padding rows are zero"


def test_decode_rows_are_bitwise_independent_of_row_neighbours_and_bucket():
    lens = [1, 15, 16, 17, 127, 128, 129, 300]
    case = make_case([1] * 8, lens, heads=(4, 2, 16))
    out = case.attend("xla")
    rng = np.random.default_rng(1)
    for rows in (rng.permutation(8), rng.permutation(8), [2] * 8, [0, 0, 0, 0, 3, 0, 0, 7], [3], [7, 2]):
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


def random_lens(rng, rows, most):
    """Lengths around what breaks: nothing, one, page and block edges."""
    edges = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129]
    return [int(rng.choice(edges) if rng.random() < 0.5 else rng.integers(0, most + 1)) for _ in range(rows)]


@pytest.mark.parametrize("heads", [(4, 2, 8), (6, 1, 64), (3, 3, 40)])
def test_random_decode_batches(heads):
    """One compiled shape, many lengths; windows are data. The path for accelerators is held to the same."""
    rng = np.random.default_rng(10)
    accelerator = jax.jit(lambda sizes, *args: xla._decode_rows(sizes, *args, sizes.head_dim**-0.5), static_argnums=0)
    for seed in range(12):
        lens = random_lens(rng, 6, 200)
        window = int(rng.choice([0, 1, 16, 100, 1000]))
        case = make_case([1] * 6, lens, heads=heads, table=13, pages=80, seed=seed)
        expected = case.attend("reference", window)
        np.testing.assert_allclose(case.attend("xla", window), expected, atol=TOLERANCE["float32"])
        sizes = xla._Sizes.of(case.q, case.cache, 64)
        table = sizes.pad(case.page_table)
        out = accelerator(sizes, case.q, case.cache, case.kv_lens, table, jnp.int32(window))
        np.testing.assert_allclose(out, expected, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("heads", [(4, 2, 8), (6, 1, 64)])
def test_random_prefill_batches(heads):
    rng = np.random.default_rng(11)
    for seed in range(12):
        kv_lens = random_lens(rng, 4, 200)
        q_lens = [int(rng.integers(0, n + 1)) for n in kv_lens]
        q_lens = [min(n, 40) for n in q_lens] if sum(q_lens) > 160 else q_lens
        kv_lens = [n if q else 0 for n, q in zip(kv_lens, q_lens, strict=True)]
        window = int(rng.choice([0, 1, 16, 100, 1000]))
        case = make_case(q_lens, kv_lens, heads=heads, padding=160 - sum(q_lens), table=13, pages=80, seed=seed)
        out = case.attend("xla", window)
        np.testing.assert_allclose(out, case.attend("reference", window), atol=TOLERANCE["float32"])
        assert not out[sum(q_lens) :].any()


@pytest.mark.parametrize("page_size", [4, 24, 256])
def test_page_sizes(page_size):
    lens = [1, page_size - 1, page_size, page_size + 1, 3 * page_size]
    decode = make_case([1] * 5, lens, page_size=page_size)
    np.testing.assert_allclose(decode.attend("xla"), decode.attend("reference"), atol=2e-6)
    prefill = make_case([1, 2, 3, 4, 2 * page_size], lens, page_size=page_size)
    np.testing.assert_allclose(prefill.attend("xla"), prefill.attend("reference"), atol=2e-6)


def test_padded_head_dim_is_ignored():
    case = make_case([1, 1, 1], [5, 16, 40], heads=(4, 2, 8))
    padded = replace(case, cache=jnp.pad(case.cache, ((0, 0),) * 4 + ((0, 8),), constant_values=jnp.nan))
    np.testing.assert_array_equal(padded.attend("xla"), case.attend("xla"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_write(dtype):
    """A cache written token by token is the one that was built by hand."""
    case = make_case([1], [37], dtype=dtype)
    k, v = (jnp.asarray(x[0], dtype) for x in (case.k, case.v))
    places = np.random.default_rng(0).permutation(37)
    empty = jnp.full_like(case.cache, 0x7FC0 if dtype == "bfloat16" else jnp.nan)
    written = write_kv(empty, k[places], v[places], case.page_table[0][places // PAGE], jnp.asarray(places % PAGE))
    np.testing.assert_array_equal(written, case.cache)


def test_write_drops_rows_out_of_range():
    cache = make_case([1], [3]).cache
    zeros = jnp.zeros((3, 2, 8))
    written = write_kv(cache, zeros, zeros, jnp.asarray([cache.shape[0], -1, 2**30]), jnp.asarray([0, 1, 2]))
    np.testing.assert_array_equal(written, cache)


def test_shapes_are_checked():
    case = make_case([1, 1], [3, 4])
    with pytest.raises(ValueError, match=r"\[T K H\]: K is 3 but was 2"):
        write_kv(case.cache, jnp.zeros((1, 2, 8)), jnp.zeros((1, 3, 8)), jnp.zeros(1, int), jnp.zeros(1, int))
    with pytest.raises(ValueError, match=r"\[B P\]: B is 1 but was 2"):
        replace(case, page_table=case.page_table[:1]).attend()
    with pytest.raises(ValueError, match=r"does not fit a cache of 2 heads of 8"):
        replace(case, q=jnp.zeros((2, 3, 8))).attend()
