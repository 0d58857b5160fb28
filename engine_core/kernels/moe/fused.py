"""All experts on every row, as dense products. For few, large experts; and the definition of the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine_core.kernels.grouped_matmul.xla import activate
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
        down: [E, F, D].

    Returns:
        [T, D] f32; zeros for rows that go to none of these experts.
    """
    exact = jax.lax.Precision.HIGHEST if down.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    chosen = routing.experts[:, :, None] - first_expert == jnp.arange(down.shape[0])  # [T, k, E]
    weights = jnp.where(chosen, routing.weights[:, :, None], 0).sum(axis=1)  # [T, E]
    products = jnp.einsum(
        "td,egdf->etgf", x.astype(gate_up.dtype), gate_up, precision=exact, preferred_element_type=jnp.float32
    )
    hidden = (activate(products) * weights.T[:, :, None]).astype(down.dtype)  # [E, T, F]
    return jnp.einsum("etf,efd->td", hidden, down, precision=exact, preferred_element_type=jnp.float32)
