"""Experts by grouped products: rows sorted by expert, only the experts that were chosen, no padding.

Under expert parallelism a row travels to the devices that hold its experts and its results travel back, each by one
ragged all-to-all (the dispatch and combine of GShard, Lepikhin et al. 2020, without its capacity limit).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engine_core.kernels.grouped_matmul import Implementation, grouped_matmul
from engine_core.kernels.moe.exchange import Exchange
from engine_core.kernels.moe.router import Routing


class ExpertWeights(NamedTuple):
    """This device's experts."""

    gate_up: jax.Array  # [E, 2, D, F]
    down: jax.Array  # [E, F, D]


class _Permutation(NamedTuple):
    """How rows lie sorted by expert."""

    rows: jax.Array  # [T * k] i32, row of each sorted assignment
    places: jax.Array  # [T, k] i32, where each assignment went
    sizes: jax.Array  # [E] i32, assignments of each expert; those of padding rows come after all of these


def grouped_experts(
    x: jax.Array,
    routing: Routing,
    weights: ExpertWeights,
    exchange: Exchange | None,
    out_dtype: jax.typing.DTypeLike,
    implementation: Implementation,
) -> jax.Array:
    """What the experts contribute to each row.

    Args:
        x: [T, D], rounded to the weights' dtype.
        routing: of these rows, over all experts of the model.
        weights: this device's experts.
        exchange: how rows reach the experts of other devices; None where this device has them all.
        out_dtype: of an expert's output row, before the rows of a token are added up.
        implementation: of the grouped matmul.

    Returns:
        [T, D] f32, a token's experts added in the order of their rank; zeros in padding rows.
    """
    num_experts = weights.down.shape[0] * (1 if exchange is None else exchange.size)
    order = _sort(routing.experts, num_experts)
    rows = x.astype(weights.down.dtype)[order.rows]
    if exchange is None:
        results = _run(rows, order.sizes, weights, out_dtype, implementation)
    else:
        per_token = min(routing.experts.shape[1], weights.down.shape[0])
        traffic = exchange.plan(order.sizes, exchange.size * per_token * x.shape[0])
        arrived = exchange.send(rows, traffic)
        computed = _run(
            arrived.at[traffic.by_expert].get(mode="clip"), traffic.sizes, weights, out_dtype, implementation
        )
        results = exchange.send_back(computed.at[traffic.by_sender].get(mode="clip"), traffic, rows.shape[0])
    valid = routing.experts[:, :, None] < num_experts
    terms = jnp.where(valid, results[order.places].astype(jnp.float32) * routing.weights[:, :, None], 0)
    return terms.sum(axis=1)


def _sort(experts: jax.Array, num_experts: int) -> _Permutation:
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")
    return _Permutation(order // experts.shape[1], places.reshape(experts.shape), sizes)


def _run(
    rows: jax.Array,
    sizes: jax.Array,
    weights: ExpertWeights,
    out_dtype: jax.typing.DTypeLike,
    implementation: Implementation,
) -> jax.Array:
    """Both products over sorted rows: [M, D] -> [M, D]."""
    gate_up, down = weights
    hidden = grouped_matmul(rows, gate_up, None, sizes, out_dtype=down.dtype, implementation=implementation)
    return grouped_matmul(hidden, down[:, None], None, sizes, out_dtype=out_dtype, implementation=implementation)
