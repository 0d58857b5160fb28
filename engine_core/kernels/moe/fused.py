"""All experts on every row, as dense products, one expert after the other; also the definition of the grouped way."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine_core.kernels.moe.grouped import ExpertWeights
from engine_core.kernels.moe.router import Routing


def fused_experts(x: jax.Array, routing: Routing, first_expert: jax.Array | int, weights: ExpertWeights) -> jax.Array:
    """What these experts contribute to each row.

    Args:
        x: [T, D], rounded to the weights' dtype.
        routing: of these rows, over all experts of the model.
        first_expert: number of the first of the experts given here, among the model's.
        weights: of these experts.

    Returns:
        [T, D] f32; zeros for rows that go to none of these experts.
    """
    exact = jax.lax.Precision.HIGHEST if weights.down.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    places = jnp.arange(weights.num_experts)
    chosen = routing.experts[:, :, None] - first_expert == places  # [T, k, E]
    shares = jnp.where(chosen, routing.weights[:, :, None], 0).sum(axis=1)  # [T, E]
    x = x.astype(weights.gate_up.dtype)

    def product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.dot(rows, matrix, precision=exact, preferred_element_type=jnp.float32)

    def add_expert(total: jax.Array, expert: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        share, place = expert
        (gate, up), (out,) = weights.gate_up[place], weights.down[place]
        hidden = jax.nn.silu(product(x, gate)) * product(x, up) * share[:, None]
        return total + product(hidden.astype(out.dtype), out), None

    total, _ = jax.lax.scan(add_expert, jnp.zeros(x.shape, jnp.float32), (shares.T, weights.first + places))
    return total
