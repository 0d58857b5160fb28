"""Experts by grouped products: rows sorted by expert, only the experts that were chosen, no padding.

Under expert parallelism a row travels to the devices that hold its experts and its results travel back, each by one
ragged all-to-all (the dispatch and combine of GShard, Lepikhin et al. 2020, without its capacity limit).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from engine_core.kernels.grouped_matmul import Implementation, grouped_matmul
from engine_core.kernels.moe.exchange import Exchange
from engine_core.kernels.moe.router import Routing


class ExpertWeights(NamedTuple):
    """This device's experts: E of the W in the stacks, which hold those of other layers, too, where layers are scanned.

    Attributes:
        gate_up: [W, 2, D, F].
        down: [W, 1, F, D].
        first: i32 scalar, place of the first of these experts.
        num_experts: E.
    """

    gate_up: jax.Array
    down: jax.Array
    first: jax.Array | int
    num_experts: int


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
    total = weights.num_experts * (1 if exchange is None else exchange.size)
    order = _sort(routing.experts, total)
    rows = x.astype(weights.down.dtype)[order.rows]
    if exchange is None:
        results = _run(rows, order.sizes, weights, out_dtype, implementation)
    else:
        per_token = min(routing.experts.shape[1], weights.num_experts)
        traffic = exchange.plan(order.sizes, exchange.size * per_token * x.shape[0])
        arrived = exchange.send(rows, traffic)
        computed = _run(
            arrived.at[traffic.by_expert].get(mode="clip"), traffic.sizes, weights, out_dtype, implementation
        )
        results = exchange.send_back(computed.at[traffic.by_sender].get(mode="clip"), traffic, rows.shape[0])
    valid = routing.experts[:, :, None] < total
    terms = jnp.where(valid, results[order.places].astype(jnp.float32) * routing.weights[:, :, None], 0)
    return terms.sum(axis=1)


def _sort(experts: jax.Array, num_experts: int) -> _Permutation:
    """Sort by expert. Without scatters, which a TPU is slow at: the inverse is a second sort, sizes are comparisons."""
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    places = jnp.argsort(order).astype(jnp.int32)
    sizes = (flat[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)
    return _Permutation(order // experts.shape[1], places.reshape(experts.shape), sizes)


def _run(
    rows: jax.Array,
    sizes: jax.Array,
    weights: ExpertWeights,
    out_dtype: jax.typing.DTypeLike,
    implementation: Implementation,
) -> jax.Array:
    """Both products over sorted rows: [M, D] -> [M, D]."""
    multiply = partial(
        grouped_matmul, scales=None, group_sizes=sizes, implementation=implementation, first=weights.first
    )
    hidden = multiply(rows, weights.gate_up, out_dtype=weights.down.dtype)
    return multiply(hidden, weights.down, out_dtype=out_dtype)
