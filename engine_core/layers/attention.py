"""Grouped-query attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from engine_core.kernels.paged_attention import Implementation, Rows, Scoring, paged_attention
from engine_core.layers.linear import ColumnLinear, Numbers, RowLinear
from engine_core.layers.norm import RMSNorm
from engine_core.layers.params import Source
from engine_core.layers.rotary import rotate, rotation
from engine_core.mesh import kv_copies
from engine_core.models.spec import ModelSpec
from engine_core.step_io import StepInputs


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention needs of one step; derived once per step by `attention_inputs`."""

    cos: jax.Array  # [T, 1, H / 2] f32
    sin: jax.Array  # [T, 1, H / 2] f32
    rows: Rows


def attention_inputs(inputs: StepInputs, frequencies: np.ndarray, page_size: int, num_pages: int) -> AttentionInputs:
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
    return AttentionInputs(cos=cos, sin=sin, rows=rows)


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
        eps = spec.rms_norm_eps
        self.q_norm = RMSNorm("self_attn.q_norm.weight", head_dim, eps) if spec.qk_norm else None
        self.k_norm = RMSNorm("self_attn.k_norm.weight", head_dim, eps) if spec.qk_norm else None
        self.head_dim = head_dim
        self.compute = numbers.compute
        self.implementation: Implementation = "auto" if numbers.kernels is None else numbers.kernels.library

    def __call__(
        self,
        x: jax.Array,
        cache: jax.Array,
        layer: int | jax.Array,
        inputs: AttentionInputs,
        window: int | jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Attend, after this step's keys and values are written.

        Args:
            x: [T, D] normed activations.
            cache: [L, num_pages, *page_shape] (this device's KV heads).
            layer: which of the cache's; int or [] i32.
            inputs: see `AttentionInputs`.
            window: tokens seen, 0 for all; int or [] i32.

        Returns:
            ([T, D] in the residual dtype, cache). One all-reduce.
        """
        q, k, v = (y.reshape(y.shape[0], -1, self.head_dim) for y in self.qkv(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, inputs.cos, inputs.sin).astype(self.compute)
        k = rotate(k, inputs.cos, inputs.sin).astype(self.compute)
        scoring = Scoring(scale=self.head_dim**-0.5, window=window)
        v = v.astype(self.compute)
        attended, cache = paged_attention(q, k, v, cache, layer, inputs.rows, scoring, self.implementation)
        return self.out(attended.reshape(x.shape[0], -1)), cache
