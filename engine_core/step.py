"""One device call: tokens in, tokens out, the cache updated in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engine_core import mesh as meshes
from engine_core.kv_cache import KVCache
from engine_core.models.decoder import Decoder, Params
from engine_core.sampling import sample
from engine_core.step_io import SamplingInputs, SlotState, StepInputs, StepOutput

Step = Callable[[Params[jax.Array], KVCache, SlotState, StepInputs], tuple[KVCache, SlotState, StepOutput]]


def step(
    model: Decoder, params: Params[jax.Array], cache: KVCache, slots: SlotState, inputs: StepInputs
) -> tuple[KVCache, SlotState, StepOutput]:
    """Run the model on a batch and draw one token per sequence row. Pure; local arrays inside shard_map.

    Args:
        model: static.
        params: weights.
        cache: keys and values; this step's are written before they are attended to.
        slots: `last_tokens` feeds rows whose `token_slots` is below S, and receives the drawn tokens.
        inputs: see `StepInputs`. T == B is a decode step, one token per row; else chunks are packed.

    Returns:
        (cache, slots, output).
    """
    sampled = slots.last_tokens.at[inputs.token_slots].get(mode="fill", fill_value=0)
    tokens = jnp.where(inputs.token_slots < slots.last_tokens.shape[0], sampled, inputs.tokens)
    logits, cache = model.forward(params, cache, tokens, inputs)
    output, slots = sample(logits, slots, inputs.slots, inputs.sampling)
    return cache, slots, output


def build_step(model: Decoder, mesh: Mesh) -> Step:
    """The jitted step of a model on a mesh; it compiles once per (T, B, P).

    Donates: cache, slots.

    Shardings: params as `load_params` places them; of the cache, pages over the row shards and KV heads over tensor;
    slots, outputs and inputs over the row shards; where several processes run it, each has the outputs whole. Results
    keep the shardings of their arguments, so that feeding them back never compiles again.

    With several row shards, T, B and S are those of all together, and every array of `StepInputs` is the
    concatenation of the shards' own: each shard's indices (rows, pages, slots, token rows) count from its own first.
    """

    def local(
        params: Params[jax.Array], cache: KVCache, slots: SlotState, inputs: StepInputs
    ) -> tuple[KVCache, SlotState, StepOutput]:
        return step(model, params, cache, slots, inputs)

    cache_spec, rows = P(*meshes.cache_axes(model.scan)), P(meshes.ROWS)
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(param_specs(model), cache_spec, rows, input_specs()),
        out_specs=(cache_spec, rows, rows),
        check_vma=False,  # all_gather leaves equal values on every device, which the type system cannot see
    )
    by_rows = meshes.by_rows(mesh)
    outputs = meshes.replicated(mesh) if jax.process_count() > 1 else by_rows
    return jax.jit(
        run,
        donate_argnums=(1, 2),
        out_shardings=(NamedSharding(mesh, cache_spec), by_rows, outputs),
        compiler_options=_compiler_options(mesh.devices.flat[0].device_kind),
    )


def _compiler_options(device_kind: str) -> dict[str, bool | str] | None:
    """What the compiler must be told.

    On TPU7x XLA likes tiles of (16, 128) for stacked bfloat16 weights, but lays arguments out in tiles of (8, 128):
    left alone it copies all weights in every step.
    """
    return {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"} if device_kind == "TPU7x" else None


def param_specs(model: Decoder) -> Any:
    """A `PartitionSpec` for each leaf of the model's params."""
    return jax.tree.map(lambda plan: P(*plan.axes), model.plan())


def input_specs() -> StepInputs:
    """A `PartitionSpec` for each field of a step's inputs: split by rows, but for the switches of the whole batch."""
    rows: Any = P(meshes.ROWS)
    switches: Any = P()
    sampling = {field.name: switches if field.name.startswith("any_") else rows for field in fields(SamplingInputs)}
    arrays = {field.name: rows for field in fields(StepInputs) if field.name != "sampling"}
    return StepInputs(**arrays, sampling=SamplingInputs(**sampling))
