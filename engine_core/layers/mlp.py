"""SwiGLU feed-forward."""

from __future__ import annotations

import jax
from flax import nnx

from engine_core.kernels.cpu import products
from engine_core.layers.linear import ColumnLinear, Numbers, RowLinear
from engine_core.layers.params import Source


class SwigluMlp(nnx.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one product, ffw columns are sharded over the tensor axis."""

    def __init__(self, hidden: int, intermediate: int, numbers: Numbers, tp: int) -> None:
        sources = [Source("mlp.gate_proj.weight", intermediate), Source("mlp.up_proj.weight", intermediate)]
        self.gate_up = ColumnLinear(sources, hidden, (), numbers, tp)
        self.down = RowLinear(Source("mlp.down_proj.weight", hidden), intermediate, numbers, tp)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, D] -> [T, D]. One all-reduce."""
        weight, numbers = self.gate_up.weight[...], self.gate_up.numbers
        x = x.astype(numbers.compute)
        target = None if numbers.kernels is None else numbers.kernels.gated(x, weight)
        if target is not None:
            return self.down(products.gated(x, weight, target))
        gate, up = self.gate_up(x)
        return self.down(jax.nn.silu(gate) * up)
