"""RMSNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from engine_core.layers.params import ParamSpec, Source, declare


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last dimension, computed in f32; the scale is stored in f32 (it is small)."""

    def __init__(self, name: str, size: int, eps: float) -> None:
        self.scale = declare(ParamSpec((size,), "float32", (None,), (Source(name, size),)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] any float dtype -> the same shape and dtype."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(x.dtype)
