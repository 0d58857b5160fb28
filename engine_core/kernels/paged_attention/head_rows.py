"""One head's rows out of packed token places, and into them.

A token place in VMEM is `[words, pack, H]`: word row w holds in each of its 32-bit lanes the same element of `pack`
neighbouring heads, the first one in the lowest bits (`engine_core.kv_cache`; queries and results are packed alike). A
head of n tokens is therefore n word rows, `words` apart, and one part of each of their lanes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_HIGH = 0xFFFF0000


def load_kv(tokens: Any, head: jax.Array | int, count: int, dtype: Any, native: bool) -> tuple[jax.Array, jax.Array]:
    """Read the keys and values of one KV head.

    Args:
        tokens: ref `[n, 2K / pack, pack, H]` in VMEM, heads K0, V0, K1, V1, ...
        head: which, [0, K).
        count: of the first tokens, a multiple of 16.
        dtype: float32 or bfloat16, of the results.
        native: compiled, not interpreted.

    Returns:
        keys, values: [count, H] in `dtype`; the values float32, for they are transposed next.
    """
    pack = tokens.shape[2]
    if pack == 1:
        keys, values = (_floats(_load_words(tokens, 2 * head + side, count, native)) for side in (0, 1))
        return keys.astype(dtype), values
    if pack == 2:
        words = _load_words(tokens, head, count, native)
        return _low(words).astype(dtype), _high(words)
    words = _load_words(tokens, lax.div(head, 2) if isinstance(head, jax.Array) else head // 2, count, native)
    first = (head % 2) * 16
    keys, values = (_small(words, first + 8 * side, tokens.dtype) for side in (0, 1))
    return keys.astype(dtype), values


def load_heads(tokens: Any, word: jax.Array | int, count: int, native: bool) -> list[jax.Array]:
    """Read the `pack` (1 or 2) neighbouring heads of word row `word`: each [count, H] f32."""
    words = _load_words(tokens, word, count, native)
    return [_floats(words)] if tokens.shape[2] == 1 else [_low(words), _high(words)]


def store_heads(tokens: Any, word: jax.Array | int, heads: list[jax.Array], native: bool) -> None:
    """Write what `load_heads` reads; the heads are f32 that hold values of the tokens' dtype."""
    bits = [pltpu.bitcast(head, jnp.uint32) for head in heads]
    words = bits[0] if len(bits) == 1 else (bits[0] >> 16) | (bits[1] & jnp.uint32(_HIGH))
    count, width = words.shape
    if native:
        rows, folds = _word_rows(tokens)
        for fold in range(folds):
            part = words[:, fold * _LANES : (fold + 1) * _LANES]
            _strided(rows, word * folds + fold, count, tokens.shape[1] * folds)[...] = part
    else:
        tokens[pl.ds(0, count), word] = pltpu.bitcast(words, tokens.dtype).reshape(count, tokens.shape[2], width)


def load_rows(tokens: Any, count: int, native: bool) -> jax.Array:
    """Read all of the first `count` of f32 tokens `[n, words, 128]`: [count, words * 128]."""
    if not native:
        values: jax.Array = tokens[pl.ds(0, count)]
        return values.reshape(count, -1)
    words = tokens.shape[1]
    rows = tokens.reshape(tokens.shape[0] * words, _LANES)
    return jnp.concatenate([_strided(rows, word, count, words)[...] for word in range(words)], axis=1)


def _load_words(tokens: Any, word: jax.Array | int, count: int, native: bool) -> jax.Array:
    """[count, H] u32. The compiler takes a view of the reference; the interpreter knows none, it gets the bits."""
    if not native:
        values = tokens[pl.ds(0, count), word]  # [count, pack, H]
        return pltpu.bitcast(values.reshape(-1, values.shape[-1]), jnp.uint32)
    rows, folds = _word_rows(tokens)
    parts = [_strided(rows, word * folds + fold, count, tokens.shape[1] * folds)[...] for fold in range(folds)]
    return parts[0] if folds == 1 else jnp.concatenate(parts, axis=1)


def _word_rows(tokens: Any) -> tuple[Any, int]:
    """View of packed tokens as u32 rows of 128 lanes; rows per word row."""
    count, words, _, width = tokens.shape
    folds = width // _LANES
    return tokens.bitcast(jnp.uint32).reshape(count * words * folds, _LANES), folds


def _strided(rows: Any, start: jax.Array | int, count: int, step: int) -> Any:
    return rows.at[pl.ds(start, count, step)] if step > 1 else rows.at[pl.ds(start, count)]


def _floats(words: jax.Array) -> jax.Array:
    return pltpu.bitcast(words, jnp.float32)


def _low(words: jax.Array) -> jax.Array:
    """The bfloat16 in the low half of each word, as float32."""
    return _floats(words << 16)


def _high(words: jax.Array) -> jax.Array:
    return _floats(words & jnp.uint32(_HIGH))


def _small(words: jax.Array, shift: jax.Array | int, dtype: Any) -> jax.Array:
    """The int8 or float8 at bit `shift` of each word, as float32; not-a-number comes out as some finite value.

    Written as integer operations: only the newest generations convert these dtypes themselves.
    """
    raised = words << jnp.asarray(24 - shift, jnp.uint32)
    if dtype == jnp.int8:
        return (pltpu.bitcast(raised, jnp.int32) >> 24).astype(jnp.float32)
    info = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
    exponent_bias = 1 - info.minexp  # 7 for e4m3, 15 for e5m2
    magnitude = (raised >> 24) & jnp.uint32(0x7F)
    bits = (magnitude << (23 - info.nmant)) + jnp.uint32((127 - exponent_bias) << 23)
    steps = pltpu.bitcast(magnitude, jnp.int32).astype(jnp.float32) * 2.0 ** (info.minexp - info.nmant)
    size = jnp.where(magnitude < (1 << info.nmant), steps, _floats(bits))
    return _floats(pltpu.bitcast(size, jnp.uint32) | (raised & jnp.uint32(0x80000000)))
