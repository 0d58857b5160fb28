"""A step's arguments as shapes and placements, without one byte of weights: enough to compile it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine_core.batch import BatchBuilder
from engine_core.kv_cache import CacheLayout, KVCache, create_cache
from engine_core.mesh import by_rows, cache_axes, num_row_shards, sharding
from engine_core.models.decoder import Decoder, Params
from engine_core.slot_table import SlotTable
from engine_core.step import input_specs
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
    place = by_rows(mesh)
    return SlotState(
        last_tokens=_abstract((num_slots,), jnp.int32, place),
        output_counts=_abstract((num_slots, vocab_size), jnp.int32, place),
        in_prompt=_abstract((num_slots, vocab_size), jnp.bool_, place),
    )


def decode_inputs(bucket: int, table: SlotTable, mesh: Mesh) -> StepInputs:
    """Of a decode step of `bucket` sequences on each row shard, as the engine's warm-up makes them."""
    return _place(BatchBuilder([table]).decode((), bucket).inputs, mesh)


def prefill_inputs(num_tokens: int, num_rows: int, table: SlotTable, mesh: Mesh) -> StepInputs:
    """Of a prefill step of `num_tokens` tokens of at most `num_rows` sequences on each row shard."""
    return _place(BatchBuilder([table]).prefill((), num_tokens, num_rows).inputs, mesh)


def _place(inputs: StepInputs, mesh: Mesh) -> StepInputs:
    """As many of one shard's inputs as there are row shards, behind one another."""

    def place(leaf: Any, spec: PartitionSpec) -> Any:
        shape = (leaf.shape[0] * num_row_shards(mesh), *leaf.shape[1:]) if leaf.ndim else ()
        return _abstract(shape, leaf.dtype, NamedSharding(mesh, spec))

    shapes: StepInputs = jax.tree.map(place, inputs, input_specs())
    return shapes


def _abstract(shape: tuple[int, ...], dtype: Any, place: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
