"""What a model's steps compute and move, counted from its declared weights and its attention shape. Host arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from engine_core.aot.roofline import StepLoad
from engine_core.kv_cache import CacheLayout
from engine_core.layers.params import WeightPlan
from engine_core.mesh import TENSOR
from engine_core.models.decoder import Decoder

_EMBEDDING = "model.embed_tokens.weight"


def weight_bytes(model: Decoder) -> int:
    """Of all weights on one device, padding included."""
    return sum(_bytes(leaf, model.tp) for leaf in _leaves(model))


def num_parameters(model: Decoder) -> int:
    """Of the checkpoint."""
    leaves = [(leaf, source) for leaf in _leaves(model) for sources in leaf.layers for source in sources]
    return sum(source.rows * math.prod(leaf.shape[2 if leaf.stacked else 1 :]) for leaf, source in leaves)


def decode_load(model: Decoder, layout: CacheLayout, num_seqs: int, context: int) -> StepLoad:
    """A decode step of `num_seqs` sequences with `context` tokens each, on one device."""
    return _load(model, layout, num_tokens=num_seqs, num_rows=num_seqs, pairs=num_seqs * context, kv=num_seqs * context)


def prefill_load(model: Decoder, layout: CacheLayout, num_tokens: int, context: int) -> StepLoad:
    """A prefill step of one chunk of a prompt of `context` tokens, the average over its chunks, on one device."""
    chunk = min(num_tokens, context)
    before = (context - chunk) / 2
    pairs = chunk * (before + (chunk + 1) / 2)
    return _load(model, layout, num_tokens=chunk, num_rows=1, pairs=pairs, kv=before + 2 * chunk)


def _load(model: Decoder, layout: CacheLayout, *, num_tokens: int, num_rows: int, pairs: float, kv: float) -> StepLoad:
    spec = model.spec
    products = read = 0.0
    for leaf in _leaves(model):
        if math.prod(leaf.shape) == max(leaf.shape):
            continue  # norms and biases
        name = leaf.layers[0][0].name
        looked_up = name == _EMBEDDING and not spec.tie_embeddings
        if looked_up:
            continue
        tokens = num_rows if name in (_EMBEDDING, "lm_head.weight") else num_tokens
        products += 2.0 * tokens * math.prod(leaf.shape) / model.tp
        read += _bytes(leaf, model.tp)
    token_bytes = layout.page_bytes / layout.page_size / model.tp
    return StepLoad(
        matmul_flops=products,
        attention_flops=4.0 * pairs * spec.num_heads * spec.head_dim * spec.num_layers / model.tp,
        weight_bytes=read,
        kv_bytes=kv * token_bytes,
    )


def _leaves(model: Decoder) -> Iterator[WeightPlan]:
    yield from jax.tree.leaves(model.plan())


def _bytes(leaf: WeightPlan, tp: int) -> int:
    shards = tp if TENSOR in leaf.axes else 1
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize // shards
