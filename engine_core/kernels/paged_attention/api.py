"""The entry to paged attention: checks, chooses an implementation, puts keys and values into the cache and attends.

Call it on local arrays: under tensor parallelism inside `jax.shard_map`, each device with its own heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from engine_core.errors import ConfigError
from engine_core.kernels.cpu import attention as compiled
from engine_core.kernels.cpu.library import Library
from engine_core.kernels.paged_attention import reference, side_by_side, tpu_decode, tpu_prefill, tuned, xla
from engine_core.kernels.paged_attention.rows import Rows, Scoring
from engine_core.kernels.shapes import check_shapes
from engine_core.kv_cache import from_storage, joined_heads, pack_heads, to_storage

Implementation = Literal["auto", "reference", "xla", "tpu", "tpu_interpreted"] | Library

_INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
_HEAD_DIMS = (64, 128, 256)
_PAGE_SIZES = (16, 32, 64, 128, 256)
_DTYPES = ("float32", "bfloat16")
_CACHE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
_GENERATIONS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
_TABLE_ENTRIES = 200_000  # page ids that SMEM (1 MiB) holds beside the rest


def check_supported(key: tuned.TuningKey, device_kind: str, table_entries: int) -> None:
    """Refuse what the TPU kernels cannot do; call it at start.

    Args:
        key: local sizes and dtypes; `op` is not read.
        device_kind: as JAX names it.
        table_entries: B * P, the page table of the largest step.

    Raises:
        ConfigError: naming what is not supported, and what is.
    """
    choices = [
        ("TPU generation", device_kind, tuple(_GENERATIONS)),
        ("head_dim", key.head_dim, _HEAD_DIMS),
        ("page_size", key.page_size, _PAGE_SIZES),
        ("dtype", key.dtype, _DTYPES),
        ("cache dtype", key.cache_dtype, _CACHE_DTYPES),
    ]
    for name, value, supported in choices:
        if value not in supported:
            listed = ", ".join(str(choice) for choice in supported)
            raise ConfigError(f"paged attention on TPU: {name} {value} is not supported; supported: {listed}")
    if key.num_heads % key.num_kv_heads:
        raise ConfigError(
            f"paged attention on TPU: {key.num_heads} query heads are no multiple of {key.num_kv_heads} KV heads"
        )
    if table_entries > _TABLE_ENTRIES:
        raise ConfigError(
            f"paged attention on TPU: a page table of {table_entries} ids does not fit scalar memory (at most "
            f"{_TABLE_ENTRIES}); raise page_size, or lower the batch or the context"
        )


def write_kv(layer_cache: jax.Array, k: jax.Array, v: jax.Array, page_ids: jax.Array, offsets: jax.Array) -> jax.Array:
    """Put the keys and values of this step's tokens in their places.

    Args:
        layer_cache: [num_pages, *page_shape]; updated in place where the caller donates it.
        k: [T, K, H], after rotary embedding.
        v: [T, K, H].
        page_ids: [T] i32; out of range (padding): dropped.
        offsets: [T] i32, place in the page, [0, page_size).

    Returns:
        The cache. No two rows may name the same place.
    """
    check_shapes("T K H", k, "T K H", v, "T", page_ids, "T", offsets)
    heads = jnp.stack([k, v], axis=2).reshape(k.shape[0], 2 * k.shape[1], k.shape[2])
    packed = to_storage(pack_heads(heads, layer_cache.shape[2:]), layer_cache.dtype)
    return layer_cache.at[page_ids, offsets].set(packed, mode="drop", wrap_negative_indices=False)


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    layer: jax.Array | int,
    rows: Rows,
    scoring: Scoring,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of packed query rows over the pages of their sequences, this step's keys and values put there.

    A token at position p sees positions up to p, the last `scoring.window` of them where that is set. The result of a
    decode row (T == B) is bitwise independent of its neighbours, its row and the length of the page table.

    Args:
        q: [T, N, H], sequence rows packed one after the other; see `Rows`.
        k: [T, K, H] of the same tokens, after rotary embedding.
        v: [T, K, H].
        cache: [L, num_pages, *page_shape] (`engine_core.kv_cache`); updated in place where the caller donates it.
            Places that no query sees may hold anything, NaN too. Heads may lie side by side in its rows.
        layer: [] i32, the layer, [0, L).
        rows: which token belongs where.
        scoring: scale, window and the like.
        implementation: "auto" chooses by the platform that the trace is for; "tpu_interpreted" runs the TPU kernels in
            the TPU interpreter, which finds races, on a CPU; a `Library` is that of a CPU, XLA where it cannot do it.

    Returns:
        [T, N, H] in q's dtype, zeros in padding rows; the cache.

    Raises:
        ValueError: shapes do not fit, or the implementation lacks a feature.
    """
    _check(q, k, v, cache, rows, scoring)
    joined = joined_heads(k.shape[1], k.shape[2], cache.shape[2:])
    if joined > 1:
        queries, keys, values = side_by_side.join(q, k, v, joined)
        out, cache = paged_attention(queries, keys, values, cache, layer, rows, scoring, implementation)
        return side_by_side.take(out, k.shape[1], joined), cache
    if implementation == "auto":
        implementation = "tpu" if _platform() == "tpu" else "xla"
    if implementation == "reference":
        return reference.paged_attention(q, k, v, cache, layer, rows, scoring)
    if implementation == "tpu":
        return _on_tpu(q, k, v, cache, layer, rows, scoring, False)
    if implementation == "tpu_interpreted":
        out, written = _on_tpu(q, k, v, from_storage(cache), layer, rows, scoring, _INTERPRET)
        return out, to_storage(written, cache.dtype)
    library = implementation if isinstance(implementation, Library) else None
    return _on_host(q, k, v, cache, layer, rows, scoring, library)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, cache: jax.Array, rows: Rows, scoring: Scoring) -> None:
    check_shapes("T N H", q, "T K H", k, "T K H", v, "T", rows.page_ids, "T", rows.offsets)
    check_shapes("B", rows.kv_lens, "B P", rows.page_table)
    if rows.cu_q_lens.shape != (rows.kv_lens.shape[0] + 1,):
        raise ValueError(f"[B + 1]: cu_q_lens has shape {rows.cu_q_lens.shape} but B is {rows.kv_lens.shape[0]}")
    joined = joined_heads(k.shape[1], k.shape[2], cache.shape[2:])
    num_kv_heads = joined * cache.shape[3] * cache.shape[4] // 2
    if q.shape[1] % k.shape[1] or q.shape[2] > cache.shape[5] or k.shape[1] > num_kv_heads:
        raise ValueError(f"[T N H]: {q.shape} does not fit a cache of {num_kv_heads} heads of {cache.shape[5]}")
    if scoring.sinks is not None:
        check_shapes("T N H", q, "N", scoring.sinks)
    if scoring.custom_mask is not None:
        check_shapes("T N H", q, "T M", scoring.custom_mask)


def _platform() -> str:
    """Of the devices that the enclosing trace is for, which need not be this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def _device_kind() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else str(device.device_kind)


def _on_host(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    layer: jax.Array | int,
    rows: Rows,
    scoring: Scoring,
    library: Library | None,
) -> tuple[jax.Array, jax.Array]:
    """Write, then attend: by XLA, or a CPU's compiled kernel."""
    for name in ("soft_cap", "sinks", "custom_mask", "k_scale", "v_scale"):
        if getattr(scoring, name) is not None:
            raise ValueError(f"paged attention in XLA has no {name}")
    here = rows.at_layer(layer, *cache.shape[:2])
    pages = write_kv(cache.reshape(-1, *cache.shape[2:]), k, v, here.page_ids, here.offsets)
    window = jnp.asarray(scoring.window, jnp.int32)
    if library is not None and compiled.attends(q, pages):
        args = (q, pages, here.kv_lens, here.page_table, here.cu_q_lens, window)
        out = compiled.attend(*args, scale=scoring.scale, target=library.attention)
    elif q.shape[0] == rows.kv_lens.shape[0]:
        out = xla.decode(q, pages, here.kv_lens, here.page_table, window, scale=scoring.scale)
    else:
        out = xla.prefill(q, pages, here.kv_lens, here.page_table, here.cu_q_lens, window, scale=scoring.scale)
    return out, pages.reshape(cache.shape)


def _on_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    layer: jax.Array | int,
    rows: Rows,
    scoring: Scoring,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Decode rows by one kernel, all others by another; a case that is statically empty is not compiled."""
    num_tokens, num_rows = q.shape[0], rows.kv_lens.shape[0]
    if num_tokens == num_rows:
        rows = replace(rows, num_decode=jnp.full((1,), num_rows, jnp.int32))
    if rows.num_decode is None:
        return _prefill(q, k, v, cache, layer, rows, scoring, interpret)
    decoded, cache = _decode(q[:num_rows], k[:num_rows], v[:num_rows], cache, layer, rows, scoring, interpret)
    if num_tokens == num_rows:
        return decoded, cache
    out, cache = _prefill(q, k, v, cache, layer, rows, scoring, interpret)
    decoded = jnp.pad(decoded, ((0, num_tokens - num_rows), (0, 0), (0, 0)))
    is_decode = jnp.arange(num_tokens) < rows.num_decode
    return jnp.where(is_decode[:, None, None], decoded, out), cache


def _prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    layer: jax.Array | int,
    rows: Rows,
    scoring: Scoring,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    tiles = tuned.prefill_tiles(_key("prefill", q, k, cache), _device_kind())
    return tpu_prefill.prefill(q, k, v, cache, layer, rows, scoring, tiles=tiles, interpret=interpret)


def _decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    layer: jax.Array | int,
    rows: Rows,
    scoring: Scoring,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Without `custom_mask`: one new token is a whole tree, and sees itself."""
    assert rows.num_decode is not None
    out, pages = tpu_decode.decode(
        q,
        k,
        v,
        cache.reshape(-1, *cache.shape[2:]),
        jnp.reshape(layer * cache.shape[1], (1,)).astype(jnp.int32),
        rows.kv_lens,
        rows.page_table,
        rows.num_decode.reshape(1),
        scoring.sinks,
        scoring.k_scale,
        scoring.v_scale,
        scale=scoring.scale,
        window=scoring.window,
        soft_cap=scoring.soft_cap,
        tiles=tuned.decode_tiles(_key("decode", q, k, cache), _device_kind()),
        interpret=interpret,
    )
    return out, pages.reshape(cache.shape)


def _key(op: str, q: jax.Array, k: jax.Array, cache: jax.Array) -> tuned.TuningKey:
    return tuned.TuningKey(
        op=op,
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        dtype=q.dtype.name,
        cache_dtype=cache.dtype.name,
        page_size=cache.shape[2],
    )
