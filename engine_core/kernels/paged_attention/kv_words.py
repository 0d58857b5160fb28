"""Keys and values out of a page's 32-bit words.

A token place is `[2K / pack, pack, H]` with heads K0, V0, K1, V1, ... (`engine_core.kv_cache`), so one 32-bit word of a
VMEM tile holds the same element of K0 and V0 (pack 2), of K0, V0, K1 and V1 (pack 4), or of one head's K or V (pack 1).
A *block* of tokens is read as a matrix of keys, or of values, one row for each (token, KV head). Any order of the rows
does for attention as long as both sides have the same; the one used is the cheapest: rows of two far words are put
together in one register. `tokens_of_rows` and `heads_of_rows` say which row is which.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

KEY, VALUE = range(2)
_LANES = 128
_BLOCK_ROWS = 256  # the MXU's depth
_FP8 = {"float8_e4m3fn": (3, 7), "float8_e5m2": (2, 15)}  # bits of the fraction, bias of the exponent


class WordLayout(NamedTuple):
    """Static description of a token place in the cache."""

    kv_heads: int  # K, without padding
    words: int  # 2K / pack
    pack: int
    width: int  # H, aligned to 128

    @property
    def heads(self) -> int:
        """KV heads with padding."""
        return self.words * self.pack // 2

    @property
    def block_tokens(self) -> int:
        """Tokens whose rows make a block."""
        return _BLOCK_ROWS // math.gcd(_BLOCK_ROWS, self.heads)

    @property
    def block_rows(self) -> int:
        """Rows of a block, a multiple of 256."""
        return self.block_tokens * self.heads


def _word_rows(tokens: Any, layout: WordLayout, block: int, start: int, step: int, native: bool) -> list[jax.Array]:
    """Every step-th word row of a block from `start` on, as [n, 128] u32 for each 128 lanes of H.

    The compiler takes a view of the reference; the interpreter knows no such views, it gets the value's bits.
    """
    folds = layout.width // _LANES
    count = layout.block_tokens * layout.words // step
    first = block * layout.block_tokens
    if native:
        words = tokens.bitcast(jnp.uint32).reshape(tokens.shape[0] * layout.words * folds, _LANES)
        begin = (first * layout.words + start) * folds
        if step * folds == 1:
            return [words[begin : begin + count]]
        return [words[pl.ds(begin + fold, count, step * folds)] for fold in range(folds)]
    values = tokens[pl.ds(first, layout.block_tokens)].reshape(-1, layout.width)
    words = pltpu.bitcast(values, jnp.uint32)[start::step]
    return [words[:, fold * _LANES : (fold + 1) * _LANES] for fold in range(folds)]


def _halves(words: jax.Array, side: int) -> jax.Array:
    """bf16 rows of one side of [n, 128] words: row 2i from word row i, row 2i + 1 from word row n / 2 + i."""
    low, high = jnp.split(words, 2)
    keys = (low & 0xFFFF) | (high << 16)
    values = (low >> 16) | (high & jnp.uint32(0xFFFF0000))
    return pltpu.bitcast(keys if side == KEY else values, jnp.bfloat16)


def _quarters(words: jax.Array, side: int, storage: Any) -> jax.Array:
    """bf16 rows of one side of [n, 128] words of bytes: row 2i from word row i, its even head, row 2i + 1 its odd one.

    Conversions would go by way of 32 bits, so bytes are put into the bits of two bf16 at a time. With s the sign bit,
    an int8 is bf16(0x4300 | its other bits) - bf16(0x4300 | s), where 0x4300 is 128. An fp8's exponent and fraction are
    moved into place and the exponent's bias is raised to bf16's. That is right for normal ones, 2^(e - bias) (1 + m).
    Those with e = 0 are 2^(1 - bias) m, which is twice the wrong number less 2^(1 - bias): the lesser of both is right
    for either kind. An fp8 that is no number comes out as one.
    """
    if storage == jnp.int8:
        pair = words >> 8 if side == VALUE else words
        return _bf16((pair & 0x007F007F) | 0x43004300) - _bf16((pair & 0x00800080) | 0x43004300)
    fraction, bias = _FP8[jnp.dtype(storage).name]
    exponents = words >> (fraction + 1) if side == VALUE else words << (7 - fraction)
    signs = words if side == VALUE else words << 8
    normal = _bf16((exponents & (0x007F007F << (7 - fraction))) + ((127 - bias) << 7) * 0x00010001)
    magnitude = jnp.minimum(normal, normal + normal - jnp.bfloat16(2.0 ** (1 - bias)))
    return _bf16(pltpu.bitcast(magnitude, jnp.uint32) | (signs & jnp.uint32(0x80008000)))


def _bf16(words: jax.Array) -> jax.Array:
    return pltpu.bitcast(words, jnp.bfloat16)


def load(tokens: Any, layout: WordLayout, block: int, side: int, dtype: Any, native: bool) -> jax.Array:
    """Keys or values of a block.

    Args:
        tokens: ref [n, 2K / pack, pack, H] in VMEM.
        layout: of a token.
        block: which one, of `layout.block_tokens` each.
        side: KEY or VALUE.
        dtype: of the result.
        native: compiled, not interpreted.

    Returns:
        [block_rows, H] in `dtype`.
    """
    if layout.pack == 1:
        folds = [pltpu.bitcast(w, jnp.float32) for w in _word_rows(tokens, layout, block, side, 2, native)]
    elif layout.pack == 2:
        folds = [_halves(words, side) for words in _word_rows(tokens, layout, block, 0, 1, native)]
    else:
        folds = [_quarters(words, side, tokens.dtype) for words in _word_rows(tokens, layout, block, 0, 1, native)]
    return jnp.concatenate(folds, axis=1).astype(dtype)


def clear(tokens: Any, layout: WordLayout, begin: jax.Array, count: int, native: bool) -> None:
    """Zero `count` tokens from `begin` on, both multiples of 8."""
    if native:
        rows = layout.words * (layout.width // _LANES)
        words = tokens.bitcast(jnp.uint32).reshape(tokens.shape[0] * rows, _LANES)
        words[pl.ds(pl.multiple_of(begin * rows, count * rows), count * rows)] = jnp.zeros(
            (count * rows, _LANES), jnp.uint32
        )
    else:
        tokens[pl.ds(begin, count)] = jnp.zeros((count, *tokens.shape[1:]), tokens.dtype)


def store(tokens: Any, layout: WordLayout, token: jax.Array | int, words: jax.Array, native: bool) -> None:
    """Put a token's [2K / pack, H] u32 words, as `pack_words` makes them, into its place."""
    if native:
        folds = layout.width // _LANES
        rows = layout.words * folds
        view = tokens.bitcast(jnp.uint32).reshape(tokens.shape[0] * rows, _LANES)
        for fold in range(folds):
            places = pl.ds(token * rows + fold, layout.words, folds) if folds > 1 else pl.ds(token * rows, rows)
            view[places] = words[:, fold * _LANES : (fold + 1) * _LANES]
    else:
        tokens[token] = pltpu.bitcast(words, tokens.dtype).reshape(tokens.shape[1:])


def pack_words(k: jax.Array, v: jax.Array, layout: WordLayout, storage: Any) -> jax.Array:
    """Lay new keys and values out as in the cache. Plain XLA; elementwise for pack 2, where it would be slow otherwise.

    Args:
        k: [B, K, H], already in units of the cache.
        v: the same.
        layout: of a token.
        storage: the cache's dtype.

    Returns:
        [B, 2K / pack, width] u32, zeros in the padding.
    """
    padding = ((0, 0), (0, layout.heads - layout.kv_heads), (0, layout.width - k.shape[2]))
    bits = jnp.dtype(f"uint{32 // layout.pack}")
    sides = [
        lax.bitcast_convert_type(jnp.pad(_rounded(side, storage), padding), bits).astype(jnp.uint32) for side in (k, v)
    ]
    if layout.pack == 1:
        return jnp.stack(sides, axis=2).reshape(k.shape[0], layout.words, layout.width)
    heads = layout.pack // 2
    words = jnp.zeros((), jnp.uint32)
    for part in range(layout.pack):
        words |= sides[part % 2][:, part // 2 :: heads] << (part * 32 // layout.pack)
    return words


def _rounded(values: jax.Array, storage: Any) -> jax.Array:
    """`values` in the cache's dtype, the nearest one, clipped where that is narrow."""
    if jnp.dtype(storage).itemsize > 1:
        return values.astype(storage)
    integer = jnp.issubdtype(storage, jnp.integer)
    highest = 127.0 if integer else float(jnp.finfo(storage).max)  # type: ignore[no-untyped-call]
    clipped = jnp.clip(values.astype(jnp.float32), -highest - integer, highest)
    return (jnp.round(clipped) if integer else clipped).astype(storage)


def _word_of_row(layout: WordLayout, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Word row, counted over the block, and half of the word's heads (pack 4) of a row."""
    count = layout.block_tokens * layout.words
    if layout.pack == 1:
        return row * 2, jnp.zeros_like(row)
    if layout.pack == 2:
        return (row & 1) * (count // 2) + (row >> 1), jnp.zeros_like(row)
    return row >> 1, row & 1


def tokens_of_rows(layout: WordLayout, shape: tuple[int, int]) -> jax.Array:
    """[_, block_rows] i32: the token, counted in its block, of each row."""
    word, _ = _word_of_row(layout, lax.broadcasted_iota(jnp.int32, shape, 1))
    return lax.div(word, layout.words)


def heads_of_rows(layout: WordLayout, shape: tuple[int, int]) -> jax.Array:
    """[_, block_rows] i32: the KV head of each row; K and above is padding."""
    word, odd = _word_of_row(layout, lax.broadcasted_iota(jnp.int32, shape, 1))
    place = lax.rem(word, layout.words)
    if layout.pack == 1:
        return place >> 1
    return place * (layout.pack // 2) + odd
