"""A step's arguments as shapes and placements, without one byte of weights: enough to compile it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from engine_core.batch import BatchBuilder
from engine_core.kv_cache import CacheLayout, KVCache, create_cache
from engine_core.mesh import cache_axes, replicated, sharding
from engine_core.models.decoder import Decoder, Params
from engine_core.slot_table import SlotTable
from engine_core.step_io import SlotState, StepInputs


def abstract_params(model: Decoder, mesh: Mesh) -> Params[Any]:
    """Shape, dtype and sharding of each leaf that `load_params` would load."""
    params: Params[Any] = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, leaf.axes)), model.plan()
    )
    return params


def abstract_cache(layout: CacheLayout, mesh: Mesh, stacked: bool) -> KVCache:
    """What `create_cache` would create."""
    place = sharding(mesh, cache_axes(stacked))
    shapes = jax.eval_shape(lambda: create_cache(layout, mesh, stacked))
    cache: KVCache = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    return cache


def abstract_slots(num_slots: int, vocab_size: int, mesh: Mesh) -> SlotState:
    """What `create_slots` would create."""
    return SlotState(
        last_tokens=_whole((num_slots,), jnp.int32, mesh),
        output_counts=_whole((num_slots, vocab_size), jnp.int32, mesh),
        in_prompt=_whole((num_slots, vocab_size), jnp.bool_, mesh),
    )


def decode_inputs(bucket: int, table: SlotTable, mesh: Mesh) -> StepInputs:
    """Of a decode step of `bucket` sequences, as the engine's warm-up makes them."""
    return _abstract(BatchBuilder(table).decode((), bucket), mesh)


def prefill_inputs(num_tokens: int, num_rows: int, table: SlotTable, mesh: Mesh) -> StepInputs:
    """Of a prefill step of `num_tokens` tokens of at most `num_rows` sequences."""
    return _abstract(BatchBuilder(table).prefill((), num_tokens, num_rows), mesh)


def _abstract(inputs: StepInputs, mesh: Mesh) -> StepInputs:
    shapes: StepInputs = jax.tree.map(lambda leaf: _whole(leaf.shape, leaf.dtype, mesh), inputs)
    return shapes


def _whole(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))
