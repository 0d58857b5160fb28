"""Which experts a token goes to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """A step's assignments."""

    experts: jax.Array  # [T, k] i32, the likeliest first; E (none) in padding rows
    weights: jax.Array  # [T, k] f32


def route(logits: jax.Array, valid: jax.Array, experts_per_token: int, *, normalize: bool) -> Routing:
    """Softmax over all experts in f32, then the top k; as in Hugging Face's Qwen3-MoE and Mixtral.

    Args:
        logits: [T, E].
        valid: [T] bool, false in padding rows.
        experts_per_token: k.
        normalize: the weights of each token are scaled to sum to 1 (the same as a softmax over the top k alone).
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, experts_per_token)
    if normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Routing(jnp.where(valid[:, None], experts.astype(jnp.int32), logits.shape[1]), weights)
