"""Mixture of SwiGLU experts in place of a dense MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
from flax import nnx

from engine_core import mesh
from engine_core.config import Degrees
from engine_core.kernels import grouped_matmul
from engine_core.kernels.moe.exchange import Exchange
from engine_core.kernels.moe.fused import fused_experts
from engine_core.kernels.moe.grouped import ExpertWeights, grouped_experts
from engine_core.kernels.moe.router import Routing, route
from engine_core.layers.linear import Numbers, matmul
from engine_core.layers.params import FusedSource, ParamSpec, Source, declare
from engine_core.models.spec import MoeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertChoice:
    """How experts are computed.

    Attributes:
        experts: sorted rows in grouped products, or all experts on every row.
        product: implementation of the grouped matmul.
        native_exchange: rows travel by `lax.ragged_all_to_all`, which XLA:CPU lacks.
    """

    experts: Literal["grouped", "fused"]
    product: grouped_matmul.Implementation
    native_exchange: bool


def choose_experts(asked: str, dtype: str, platform: str) -> ExpertChoice:
    """What "auto", "grouped" or "fused" means for weights of a dtype on a platform ("cpu", "gpu", "tpu")."""
    product: grouped_matmul.Implementation = "tiled" if platform == "cpu" else "ragged_dot"
    if platform == "tpu" and dtype == "bfloat16":
        product = "tpu"
    return ExpertChoice(
        experts="fused" if asked == "fused" else "grouped", product=product, native_exchange=platform != "cpu"
    )


class MoeMlp(nnx.Module):
    """Router and experts; experts over the expert axis, the ffw columns of each over the tensor axis."""

    def __init__(self, spec: MoeSpec, hidden: int, numbers: Numbers, degrees: Degrees, choice: ExpertChoice) -> None:
        count, size, names = spec.num_experts, spec.intermediate_size, spec.names
        router = Source(f"{names.block}.gate.weight", count, FusedSource("mlp.gate.weight", (count,), (), 0))
        self.router = declare(ParamSpec((count, hidden), numbers.weight, (None, None), (router,)))
        gate_up, down = _sources(spec, hidden)
        self.gate_up = declare(
            ParamSpec(
                (count, 2, hidden, size),
                numbers.weight,
                (mesh.EXPERT, None, None, mesh.TENSOR),
                gate_up,
                (count, 2),
                transposed=True,
            )
        )
        self.down = declare(
            ParamSpec(
                (count, size, hidden),
                numbers.weight,
                (mesh.EXPERT, mesh.TENSOR, None),
                down,
                (count,),
                transposed=True,
            )
        )
        if choice.experts == "grouped" and choice.product == "tpu":
            columns = size // degrees.tp
            for depth, width in ((hidden, columns), (columns, hidden)):
                grouped_matmul.check_supported(numbers.compute, numbers.weight, depth, width)
        self.spec = spec
        self.numbers = numbers
        self.degrees = degrees
        self.choice = choice

    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """Send each row to its experts and add up what they say.

        Args:
            x: [T, D] any float dtype.
            valid: [T] bool, false in padding rows.

        Returns:
            [T, D] in the residual dtype, zeros in padding rows. One all-reduce over the tensor axis. Over the expert
            axis: two exchanges of rows and an all-gather of counts, or (fused) all-gathers and a reduce-scatter.
        """
        logits = matmul(x, self.router[...], self.numbers.min_rows)
        routing = route(logits, valid, self.spec.experts_per_token, normalize=self.spec.normalize)
        weights = ExpertWeights(self.gate_up[...], self.down[...])
        if self.choice.experts == "fused":
            mixed = self._fused(x, routing, weights)
        else:
            mixed = self._grouped(x, routing, weights)
        return mesh.all_reduce(mixed.astype(self.numbers.residual), self.degrees.tp)

    def _grouped(self, x: jax.Array, routing: Routing, weights: ExpertWeights) -> jax.Array:
        ep = self.degrees.ep
        exchange = Exchange(mesh.EXPERT, ep, self.choice.native_exchange) if ep > 1 else None
        return grouped_experts(x, routing, weights, exchange, self.numbers.residual, self.choice.product)

    def _fused(self, x: jax.Array, routing: Routing, weights: ExpertWeights) -> jax.Array:
        ep = self.degrees.ep
        if ep == 1:
            return fused_experts(x, routing, 0, *weights)
        x, experts, scores = (jax.lax.all_gather(y, mesh.EXPERT, tiled=True) for y in (x, *routing))
        first = jax.lax.axis_index(mesh.EXPERT) * weights.down.shape[0]
        mixed = fused_experts(x, Routing(experts, scores), first, *weights)
        own: jax.Array = jax.lax.psum_scatter(mixed, mesh.EXPERT, tiled=True)
        return own


def _sources(spec: MoeSpec, hidden: int) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """Checkpoint tensors of gate and up, and of down, expert by expert; transformers 5 may have fused them."""
    count, size, names = spec.num_experts, spec.intermediate_size, spec.names
    gate_up, down = [], []
    for expert in range(count):
        prefix = f"{names.block}.experts.{expert}"
        for name, start in ((names.gate, 0), (names.up, size)):
            fused = FusedSource("mlp.experts.gate_up_proj", (count, 2 * size), (expert,), start)
            gate_up.append(Source(f"{prefix}.{name}.weight", size, fused))
        fused = FusedSource("mlp.experts.down_proj", (count, hidden), (expert,), 0)
        down.append(Source(f"{prefix}.{names.down}.weight", hidden, fused))
    return tuple(gate_up), tuple(down)
