"""One call of paged attention for tests: sequences of given lengths over a cache that holds NaN wherever it may."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from engine_core.kernels.paged_attention import Rows, Scoring
from engine_core.kernels.paged_attention.tpu_prefill import PrefillTiles

TILES = PrefillTiles(tile_q=128, lanes=128, tile_kv=128, sub_kv=64, lookahead=1, body_heads=1)
FEW = ((3, 0, 1, 17), (3, 0, 130, 140))  # query and KV lengths
# options to compile fast what runs once
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FEATURES = {
    "window": {"window": 100},
    "soft_cap": {"soft_cap": 5.0},
    "sinks": {"sinks": True},
    "tree": {"tree": True},
    "float32": {"dtype": "float32", "cache_dtype": "float32"},
    "wide_q": {"dtype": "float32"},
    "int8": {"cache_dtype": "int8", "scales": (0.05, 0.04)},
    "e4m3": {"cache_dtype": "float8_e4m3fn", "scales": (0.05, 0.04)},
    "e5m2": {"cache_dtype": "float8_e5m2"},
    "head64": {"head_dim": 64},
    "head256": {"head_dim": 256},
    "mqa": {"heads": 8, "kv_heads": 1},
    "mha": {"heads": 3, "kv_heads": 3},
    "page64": {"page_size": 64},
    "padding": {"padding": 200},
    "skip": {"num_decode": 2},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the kernel."""

    q_lens: tuple[int, ...] = FEW[0]
    kv_lens: tuple[int, ...] = FEW[1]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    window: int = 0
    soft_cap: float | None = None
    sinks: bool = False
    tree: bool = False
    scales: tuple[float, float] | None = None
    padding: int = 3
    num_decode: int | None = None
    layers: int = 2
    layer: int = 1
    spare_columns: int = 2
    tiles: PrefillTiles = TILES


def make_rows(case, rng):
    """A step's rows, its page ids shuffled, far out of range where a row needs none."""
    used = [-(-n // case.page_size) for n in case.kv_lens]
    num_pages = sum(used) + 3
    ids = iter(rng.permutation(num_pages))
    table = np.full((len(used), max(used) + case.spare_columns), 2**30, np.int32)
    places, total = [], sum(case.q_lens) + case.padding
    for row, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        table[row, : used[row]] = [next(ids) for _ in range(used[row])]
        if case.window:  # what every query's window has passed may be gone
            table[row, : max(0, kv_len - q_len + 1 - case.window) // case.page_size] = 2**30
        places += [(table[row, p // case.page_size], p % case.page_size) for p in range(kv_len - q_len, kv_len)]
    places += [(num_pages, 0)] * (total - len(places))
    page_ids, offsets = np.array(places, np.int32).T
    arrays = (page_ids, offsets, table, np.array(case.kv_lens), np.cumsum([0, *case.q_lens]))
    num_decode = None if case.num_decode is None else jnp.array([case.num_decode], jnp.int32)
    return Rows(*(jnp.asarray(a, jnp.int32) for a in arrays), num_decode), num_pages


def make_cache(case, rows, num_pages, rng):
    """What earlier steps left; NaN (or the lowest code) elsewhere."""
    storage = np.dtype(getattr(ml_dtypes, case.cache_dtype, None) or case.cache_dtype)
    pack, width = 4 // storage.itemsize, -(-case.head_dim // 128) * 128
    slots = -(-2 * case.kv_heads // pack) * pack
    nan = -128 if case.cache_dtype == "int8" else np.nan
    cache = np.full((case.layers, num_pages, case.page_size, slots, width), nan).astype(storage)
    table = np.asarray(rows.page_table)
    for row, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        for position in range(kv_len - q_len):
            page = table[row, position // case.page_size]
            if page < num_pages:
                content = rng.standard_normal((2 * case.kv_heads, case.head_dim)) * (20 if case.scales else 1)
                place = (case.layer, page, position % case.page_size, slice(2 * case.kv_heads))
                cache[place] = 0  # padding of the heads
                cache[*place, : case.head_dim] = content.astype(storage)
    return jnp.asarray(cache.reshape(*cache.shape[:3], slots // pack, pack, width))


def make_tree(case, rng):
    """[T, M] bool: each token sees itself and some of those before it in its sequence."""
    tree = np.zeros((sum(case.q_lens) + case.padding, max(case.q_lens)), bool)
    token = 0
    for q_len in case.q_lens:
        seen = np.tril(rng.random((q_len, q_len)) < 0.4) | np.eye(q_len, dtype=bool)
        tree[token : token + q_len, :q_len] = seen
        token += q_len
    return jnp.asarray(tree)


@dataclass(frozen=True)
class Arrays:
    """The arguments of `paged_attention`."""

    q: jnp.ndarray
    k: jnp.ndarray
    v: jnp.ndarray
    cache: jnp.ndarray
    rows: Rows
    scoring: Scoring


def make_arrays(case, seed):
    rng = np.random.default_rng(seed)
    rows, num_pages = make_rows(case, rng)
    cache = make_cache(case, rows, num_pages, rng)
    total = rows.page_ids.shape[0]
    q, k, v = (
        jnp.asarray(rng.standard_normal((total, heads, case.head_dim)), case.dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    scoring = Scoring(
        scale=case.head_dim**-0.5,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=jnp.asarray(rng.standard_normal(case.heads) * 2, jnp.float32) if case.sinks else None,
        custom_mask=make_tree(case, rng) if case.tree else None,
        k_scale=None if case.scales is None else jnp.float32(case.scales[0]),
        v_scale=None if case.scales is None else jnp.float32(case.scales[1]),
    )
    return Arrays(q, k, v, cache, rows, scoring)
