"""All experts on every row, as dense products, one expert after the other; also the definition of the grouped way."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine_core.kernels.moe.router import Routing


def fused_experts(
    x: jax.Array, routing: Routing, first_expert: jax.Array | int, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """What these experts contribute to each row.

    Args:
        x: [T, D], rounded to the weights' dtype.
        routing: of these rows, over all experts of the model.
        first_expert: number of the first of the experts given here.
        gate_up: [E, 2, D, F].
        down: [E, 1, F, D].

    Returns:
        [T, D] f32; zeros for rows that go to none of these experts.
    """
    exact = jax.lax.Precision.HIGHEST if down.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    chosen = routing.experts[:, :, None] - first_expert == jnp.arange(down.shape[0])  # [T, k, E]
    weights = jnp.where(chosen, routing.weights[:, :, None], 0).sum(axis=1)  # [T, E]
    x = x.astype(gate_up.dtype)

    def product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.dot(rows, matrix, precision=exact, preferred_element_type=jnp.float32)

    def add_expert(total: jax.Array, expert: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        weight, (gate, up), (out,) = expert
        hidden = jax.nn.silu(product(x, gate)) * product(x, up) * weight[:, None]
        return total + product(hidden.astype(out.dtype), out), None

    total, _ = jax.lax.scan(add_expert, jnp.zeros(x.shape, jnp.float32), (weights.T, gate_up, down))
    return total
