"""What paged attention is told besides the arrays: which token belongs where, and how scores are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The token rows of one step, packed sequence row after sequence row; the same for all layers.

    Token j of sequence row b, the j-th of its q_len = cu_q_lens[b + 1] - cu_q_lens[b], sits at position
    kv_lens[b] - q_len + j. T == B means decode: one token for each sequence row, cu_q_lens is not read.

    Attributes:
        page_ids: [T] i32, page that receives the token's key and value; out of range (padding): dropped.
        offsets: [T] i32, its place in the page.
        page_table: [B, P] i32, page ids in order; anything beyond the last used page.
        kv_lens: [B] i32, tokens in the cache, this step's included; 0 is padding.
        cu_q_lens: [B + 1] i32, cumulative query lengths; token rows from cu_q_lens[B] on are padding.
        num_decode: [1] i32, so many of the first sequence rows have exactly one token (T > B, a mixed step); None: not
            known. It chooses kernels, never results.
    """

    page_ids: jax.Array
    offsets: jax.Array
    page_table: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    num_decode: jax.Array | None

    def at_layer(self, layer: jax.Array | int, num_layers: int, num_pages: int) -> Rows:
        """The same for a layer of a cache that is seen as `[num_layers * num_pages, *page_shape]`.

        An index into the flat cache keeps its scatters in place; slicing a layer out and putting it back copies it.
        """
        if num_layers == 1:
            return self

        def shift(ids: jax.Array) -> jax.Array:
            return jnp.where(ids < num_pages, ids + layer * num_pages, num_layers * num_pages)

        return replace(self, page_ids=shift(self.page_ids), page_table=shift(self.page_table))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How scores come about and count.

    Attributes:
        scale: of the scores, H ** -0.5 as a rule.
        window: tokens that a query sees, its own included; 0: all. An int, or [] i32 where layers are scanned.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None: they stay.
        sinks: [N] f32, a score of each head that takes weight and has no value; None: none.
        custom_mask: [T, M] bool, for speculative trees: token row t sees its sequence's i-th new token only where
            custom_mask[t, i], which must hold for t itself; no sequence has more than M new tokens. A sequence with a
            single new token needs no mask, so its row may be a decode row. None: all up to its own.
        k_scale: value of one unit of the cached keys, [] f32, for int8 and fp8 caches; None: 1.
        v_scale: the same for values.
    """

    scale: float
    window: int | jax.Array
    soft_cap: float | None = None
    sinks: jax.Array | None = None
    custom_mask: jax.Array | None = None
    k_scale: jax.Array | float | None = None
    v_scale: jax.Array | float | None = None


def quantized(values: jax.Array, scale: jax.Array | float | None, dtype: Any) -> jax.Array:
    """`values / scale` in the cache's dtype where that is narrow: to the nearest, clipped; else `values`."""
    if dtype in (jnp.uint16, jnp.uint8) or jnp.dtype(dtype).itemsize > 1:  # `to_storage` sees to it
        return values
    scaled = values.astype(jnp.float32) / (1.0 if scale is None else scale)
    if dtype == jnp.int8:
        return jnp.round(jnp.clip(scaled, -128, 127)).astype(dtype)
    highest = float(jnp.finfo(dtype).max)  # type: ignore[no-untyped-call]
    return jnp.clip(scaled, -highest, highest).astype(dtype)
