"""Mixture of SwiGLU experts in place of a dense MLP.

Experts are split over the expert axis. Over the tensor axis, whose devices hold the same rows, they are split as well:
by ffw columns (every device does the same share of every expert), or by experts, where a share of the columns would be
narrower than a TPU's tiles. Either way a device ends up with a part of each row's sum, and one all-reduce adds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from engine_core import mesh
from engine_core.config import Degrees
from engine_core.errors import ConfigError
from engine_core.kernels import grouped_matmul
from engine_core.kernels.moe.exchange import Exchange
from engine_core.kernels.moe.fused import fused_experts
from engine_core.kernels.moe.grouped import ExpertWeights, grouped_experts
from engine_core.kernels.moe.router import Routing, route
from engine_core.layers.linear import Numbers, matmul
from engine_core.layers.params import FusedSource, ParamSpec, Source, declare
from engine_core.models.spec import MoeSpec

_TPU_LANES = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertChoice:
    """How experts are computed.

    Attributes:
        experts: sorted rows in grouped products, or all experts on every row.
        product: implementation of the grouped matmul.
        native_exchange: rows travel by `lax.ragged_all_to_all`, which XLA:CPU lacks.
        column_align: columns of an expert on one device are a multiple of this, or it is split by experts.
    """

    experts: Literal["grouped", "fused"]
    product: grouped_matmul.Implementation
    native_exchange: bool
    column_align: int

    def splits_columns(self, spec: MoeSpec, degrees: Degrees) -> bool:
        """Whether the tensor axis splits the ffw columns of an expert; otherwise it splits the experts.

        Raises:
            ConfigError: neither can be.
        """
        if spec.num_experts % degrees.ep:
            raise ConfigError(f"ep {degrees.ep} does not divide the model's number of experts {spec.num_experts}")
        if spec.intermediate_size % (degrees.tp * self.column_align) == 0 or degrees.tp == 1:
            return True
        if spec.num_experts % (degrees.ep * degrees.tp) == 0:
            return False
        if spec.intermediate_size % degrees.tp:
            raise ConfigError(
                f"tp {degrees.tp} divides neither the columns of an expert, {spec.intermediate_size}, nor the "
                f"{spec.num_experts // degrees.ep} experts of each device on the expert axis"
            )
        return True


def choose_experts(asked: str, dtype: str, platform: str) -> ExpertChoice:
    """What "auto", "grouped" or "fused" means for weights of a dtype on a platform ("cpu", "gpu", "tpu")."""
    product: grouped_matmul.Implementation = "tiled" if platform == "cpu" else "ragged_dot"
    if platform == "tpu" and dtype == "bfloat16":
        product = "tpu"
    return ExpertChoice(
        experts="fused" if asked == "fused" else "grouped",
        product=product,
        native_exchange=platform != "cpu",
        column_align=_TPU_LANES if platform == "tpu" else 1,
    )


class MoeMlp(nnx.Module):
    """Router, and this device's part of the experts.

    Raises:
        ConfigError: the degrees do not divide the experts, or the TPU kernel does not support their sizes.
    """

    def __init__(self, spec: MoeSpec, hidden: int, numbers: Numbers, degrees: Degrees, choice: ExpertChoice) -> None:
        count, size, names = spec.num_experts, spec.intermediate_size, spec.names
        router = Source(f"{names.block}.gate.weight", count, FusedSource("mlp.gate.weight", (count,), (), 0))
        self.router = declare(ParamSpec((count, hidden), numbers.held(hidden), (None, None), (router,)))
        gate_up, down = _sources(spec, hidden)
        self.by_columns = choice.splits_columns(spec, degrees)
        expert_axis = mesh.EXPERT if self.by_columns else (mesh.EXPERT, mesh.TENSOR)
        column_axis = mesh.TENSOR if self.by_columns else None
        self.gate_up = declare(
            ParamSpec(
                (count, 2, hidden, size),
                numbers.compute,
                (expert_axis, None, None, column_axis),
                gate_up,
                (count, 2),
                transposed=True,
            )
        )
        self.down = declare(
            ParamSpec(
                (count, 1, size, hidden),  # as the grouped matmul takes it: a CPU copies what is reshaped into a loop
                numbers.compute,
                (expert_axis, None, column_axis, None),
                down,
                (count, 1),
                transposed=True,
            )
        )
        if choice.experts == "grouped" and choice.product == "tpu":
            columns = size // degrees.tp if self.by_columns else size
            for depth, width in ((hidden, columns), (columns, hidden)):
                grouped_matmul.check_supported(numbers.compute, numbers.compute, depth, width)
        self.held = count // (degrees.ep if self.by_columns else degrees.ep * degrees.tp)  # experts, by a device
        self.spec = spec
        self.numbers = numbers
        self.degrees = degrees
        self.choice = choice

    def __call__(self, x: jax.Array, valid: jax.Array, place: jax.Array | int = 0) -> jax.Array:
        """Send each row to its experts and add up what they say.

        Args:
            x: [T, D] any float dtype.
            valid: [T] bool, false in padding rows.
            place: i32 scalar, of this layer among those whose experts the weights stack; 0 where they are its own.

        Returns:
            [T, D] in the residual dtype, zeros in padding rows. One all-reduce over the tensor axis. Over the expert
            axis: two exchanges of rows and an all-gather of counts, or (fused) all-gathers and a reduce-scatter.
        """
        logits = matmul(x, self.router[...], self.numbers)
        routing = route(logits, valid, self.spec.experts_per_token, normalize=self.spec.normalize)
        weights = ExpertWeights(self.gate_up[...], self.down[...], place * self.held, self.held)
        if self.choice.experts == "fused":
            mixed = self._fused(x, routing, weights)
        else:
            mixed = self._grouped(x, routing, weights)
        return mesh.all_reduce(mixed.astype(self.numbers.residual), self.degrees.tp)

    def _grouped(self, x: jax.Array, routing: Routing, weights: ExpertWeights) -> jax.Array:
        ep = self.degrees.ep
        if not self.by_columns:
            routing = self._own(routing)
        exchange = Exchange(mesh.EXPERT, ep, self.choice.native_exchange) if ep > 1 else None
        return grouped_experts(x, routing, weights, exchange, self.numbers.residual, self.choice.product)

    def _own(self, routing: Routing) -> Routing:
        """The assignments to experts that have this device's place on the tensor axis, counted among these alone."""
        tp, held = self.degrees.tp, self.held
        owner, place = routing.experts // held, routing.experts % held
        own = (owner % tp == mesh.shard_index(tp)) & (routing.experts < self.spec.num_experts)
        return Routing(jnp.where(own, owner // tp * held + place, self.degrees.ep * held), routing.weights)

    def _fused(self, x: jax.Array, routing: Routing, weights: ExpertWeights) -> jax.Array:
        ep, tp = self.degrees.ep, self.degrees.tp
        holder = jax.lax.axis_index(mesh.EXPERT) if ep > 1 else 0
        if not self.by_columns:
            holder = holder * tp + mesh.shard_index(tp)
        first = holder * self.held
        if ep == 1:
            return fused_experts(x, routing, first, weights)
        x, experts, scores = (jax.lax.all_gather(y, mesh.EXPERT, tiled=True) for y in (x, *routing))
        mixed = fused_experts(x, Routing(experts, scores), first, weights)
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
