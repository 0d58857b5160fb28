"""What a model's steps compute and move, counted from its declared weights and its attention shape. Host arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from engine_core.aot.roofline import StepLoad
from engine_core.kv_cache import CacheLayout
from engine_core.layers.params import WeightPlan
from engine_core.mesh import EXPERT, TENSOR
from engine_core.models.decoder import Decoder

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weight_bytes(model: Decoder) -> int:
    """Of all weights on one device, padding included."""
    leaves = _leaves(model)
    return sum(math.prod(leaf.shape) // _shards(leaf, model) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def num_parameters(model: Decoder) -> int:
    """Of the checkpoint."""
    return sum(
        source.rows * (leaf.shape[len(leaf.stack)] if leaf.transposed else math.prod(leaf.shape[len(leaf.stack) + 1 :]))
        for leaf in _leaves(model)
        for sources in leaf.parts
        for source in sources
    )


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
    spec, tp = model.spec, model.degrees.tp
    products = read = 0.0
    for leaf in _leaves(model):
        size = math.prod(leaf.shape) / _shards(leaf, model)
        name = leaf.parts[0][0].name
        if math.prod(leaf.shape) == max(leaf.shape) or (name == _EMBEDDING and not spec.tie_embeddings):
            continue  # norms and biases; a table that is only looked up
        tokens = num_rows if name in (_EMBEDDING, _HEAD) else num_tokens
        used = hit = 1.0
        if _has_experts(leaf):  # rows of all devices on the expert axis come here
            tokens *= model.degrees.ep
            used, hit = _expert_shares(model, tokens)
        products += 2.0 * tokens * size * used
        read += size * hit * jnp.dtype(leaf.dtype).itemsize
    token_bytes = layout.page_bytes / layout.page_size / tp
    return StepLoad(
        matmul_flops=products,
        attention_flops=4.0 * pairs * spec.num_heads * spec.head_dim * spec.num_layers / tp,
        weight_bytes=read,
        kv_bytes=kv * token_bytes,
        exchange_bytes=_exchange_bytes(model, num_tokens),
    )


def _has_experts(leaf: WeightPlan) -> bool:
    return any(EXPERT in (axis if isinstance(axis, tuple) else (axis,)) for axis in leaf.axes)


def _exchange_bytes(model: Decoder, num_tokens: int) -> float:
    """Rows that a device sends to experts and gets back, where tokens choose evenly; few of them stay at home."""
    moe, degrees = model.spec.moe, model.degrees
    if moe is None or degrees.ep == 1:
        return 0.0
    senders = 1 if model.experts.splits_columns(moe, degrees) else degrees.tp
    out_and_back = jnp.dtype(model.numbers.weight).itemsize + jnp.dtype(model.numbers.residual).itemsize
    rows = num_tokens * moe.experts_per_token / senders
    return sum(moe.layers) * rows * model.spec.hidden_size * out_and_back


def _expert_shares(model: Decoder, tokens: int) -> tuple[float, float]:
    """Share of the experts that a token uses, and that a step reads where tokens choose evenly and independently."""
    moe = model.spec.moe
    assert moe is not None
    used = moe.experts_per_token / moe.num_experts
    return used, 1 - (1 - used) ** tokens


def _leaves(model: Decoder) -> Iterator[WeightPlan]:
    yield from jax.tree.leaves(model.plan())


def _shards(leaf: WeightPlan, model: Decoder) -> int:
    """Devices that share the leaf's elements."""
    sizes = {TENSOR: model.degrees.tp, EXPERT: model.degrees.ep}
    names = [name for axis in leaf.axes for name in (axis if isinstance(axis, tuple) else (axis,))]
    return math.prod([sizes.get(name, 1) for name in names if name is not None])
