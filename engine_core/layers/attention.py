"""Grouped-query attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine_core.kernels.cpu.heads import DIM_ALIGN, split_heads
from engine_core.kernels.paged_attention import Implementation, Rows, Scoring, paged_attention
from engine_core.kv_scales import KvScales
from engine_core.layers.linear import ColumnLinear, Numbers, RowLinear
from engine_core.layers.norm import RMSNorm
from engine_core.layers.params import Source
from engine_core.layers.rotary import rotate, rotation
from engine_core.mesh import TENSOR, kv_copies
from engine_core.models.spec import ModelSpec
from engine_core.step_io import StepInputs


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention needs of one step; derived once per step by `attention_inputs`."""

    cos: jax.Array  # [T, 1, H / 2] f32
    sin: jax.Array  # [T, 1, H / 2] f32
    rows: Rows
    units: jax.Array | None  # [L, 2, K] f32, what 1 in a float8 cache stands for (this device's heads); None: 1

    def of_layer(self, number: int | jax.Array) -> LayerInputs:
        """What one layer needs."""
        return LayerInputs(self.cos, self.sin, self.rows, None if self.units is None else self.units[number])


@dataclass(frozen=True)
class LayerInputs:
    """`AttentionInputs` of one layer."""

    cos: jax.Array
    sin: jax.Array
    rows: Rows
    units: jax.Array | None  # [2, K] f32


def attention_inputs(
    inputs: StepInputs, frequencies: np.ndarray, page_size: int, num_pages: int, units: jax.Array | None
) -> AttentionInputs:
    """Angles and landing places of a step's tokens. Padding rows (`rows == B`) get page id `num_pages`: dropped."""
    cos, sin = rotation(inputs.positions, frequencies)
    page_ids = inputs.page_table.at[inputs.rows, inputs.positions // page_size].get(mode="fill", fill_value=num_pages)
    rows = Rows(
        page_ids=page_ids,
        offsets=inputs.positions % page_size,
        page_table=inputs.page_table,
        kv_lens=inputs.kv_lens,
        cu_q_lens=inputs.cu_q_lens,
        num_decode=None,
    )
    return AttentionInputs(cos=cos, sin=sin, rows=rows, units=units)


def local_units(scales: KvScales, tp: int) -> jax.Array:
    """Those of this device's KV heads, within a shard_map: [L, 2, K] f32. float8 caches hold no copies of heads."""
    whole = jnp.asarray(np.array(scales, np.float32).reshape(len(scales), -1, 2).swapaxes(1, 2))
    size = whole.shape[2] // tp
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(TENSOR) * size, size, axis=2)


class Attention(nnx.Module):
    """Projections, head norms, rotation, cache write, attention, output projection; heads over the tensor axis.

    Where it has more devices than there are KV heads, neighbours hold the same one, for different query heads.
    """

    def __init__(self, spec: ModelSpec, numbers: Numbers, tp: int) -> None:
        heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        copies = {"q": 1, "k": kv_copies(kv_heads, tp), "v": kv_copies(kv_heads, tp)}
        weights = [Source(f"self_attn.{x}_proj.weight", rows[x], copies=copies[x]) for x in rows]
        biases = [Source(f"self_attn.{x}_proj.bias", rows[x], copies=copies[x]) for x in rows if spec.qkv_bias]
        self.qkv = ColumnLinear(weights, spec.hidden_size, biases, numbers, tp)
        self.out = RowLinear(Source("self_attn.o_proj.weight", spec.hidden_size), rows["q"], numbers, tp)
        self.eps = spec.rms_norm_eps
        self.q_norm = RMSNorm("self_attn.q_norm.weight", head_dim, self.eps) if spec.qk_norm else None
        self.k_norm = RMSNorm("self_attn.k_norm.weight", head_dim, self.eps) if spec.qk_norm else None
        self.head_dim = head_dim
        self.compute = numbers.compute
        self.kernels = numbers.kernels
        self.implementation: Implementation = "auto" if numbers.kernels is None else numbers.kernels.library

    def __call__(
        self,
        x: jax.Array,
        cache: jax.Array,
        layer: int | jax.Array,
        inputs: LayerInputs,
        window: int | jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Attend, after this step's keys and values are written.

        Args:
            x: [T, D] normed activations.
            cache: [L, num_pages, *page_shape] (this device's KV heads).
            layer: which of the cache's; int or [] i32.
            inputs: see `LayerInputs`.
            window: tokens seen, 0 for all; int or [] i32.

        Returns:
            ([T, D] in the residual dtype, cache). One all-reduce.
        """
        q, k, v = self._heads(x, inputs)
        scoring = Scoring(scale=self.head_dim**-0.5, window=window)
        if inputs.units is not None:
            k_units, v_units = inputs.units
            q, k, v = _times(q, k_units), _times(k, 1 / k_units), _times(v, 1 / v_units)
        attended, cache = paged_attention(q, k, v, cache, layer, inputs.rows, scoring, self.implementation)
        if inputs.units is not None:
            attended = _times(attended, v_units)
        return self.out(attended.reshape(x.shape[0], -1)), cache

    def _heads(self, x: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[T, D] -> queries [T, N, H], keys [T, K, H] and values [T, K, H] in the compute dtype."""
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        if self.kernels is not None and self.head_dim % DIM_ALIGN == 0:
            return split_heads(
                self.qkv.fused(x),
                None if norms is None else (norms[0].scale[...], norms[1].scale[...]),
                (inputs.cos, inputs.sin),
                heads=self.qkv.splits[0] // self.head_dim,
                kv_heads=self.qkv.splits[1] // self.head_dim,
                eps=self.eps,
                dtype=self.compute,
                target=self.kernels.library.heads,
            )
        q, k, v = (y.reshape(y.shape[0], -1, self.head_dim) for y in self.qkv(x))
        if norms is not None:
            q, k = norms[0](q), norms[1](k)
        q, k = (rotate(y, inputs.cos, inputs.sin).astype(self.compute) for y in (q, k))
        return q, k, v.astype(self.compute)


def _times(heads: jax.Array, factors: jax.Array) -> jax.Array:
    """[T, N, H], N a multiple of K, by [K] f32: each for as many heads as share it."""
    wide = heads.astype(jnp.float32) * jnp.repeat(factors, heads.shape[1] // factors.size)[:, None]
    return wide.astype(heads.dtype)
