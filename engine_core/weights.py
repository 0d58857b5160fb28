"""Checkpoints: reading safetensors straight into sharded device arrays.

Each device's part of a weight is read once, cast on the host, and put on that device; no tensor is ever held whole on a
device that keeps only a part of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from engine_core.errors import CheckpointError
from engine_core.layers.params import Source, WeightPlan
from engine_core.mesh import sharding
from engine_core.models.decoder import Decoder, Params
from engine_core.models.registry import read_json

Progress = Callable[[int, int], None]  # (bytes read, bytes in total)

ITEM_SIZES = {"F32": 4, "BF16": 2, "F16": 2}
# Written by old versions of transformers; computed here.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load_params(model_dir: Path, model: Decoder, mesh: Mesh, progress: Progress | None) -> Params[jax.Array]:
    """Read all weights of a model, each into its sharding.

    Args:
        model_dir: holds model.safetensors, or model.safetensors.index.json and the files it names.
        model: says which tensors there must be, and their shapes.
        mesh: where they go.
        progress: called after each leaf.

    Raises:
        CheckpointError: naming what is missing, unexpected, truncated or of another shape.
    """
    plan = model.plan()
    with ExitStack() as stack:
        tensors = _open(model_dir, stack)
        _check(model_dir, plan, tensors, model.spec.tie_embeddings)
        total = sum(_num_bytes(tensors[source.name]) for source in _sources(plan))
        done = 0

        def load(leaf: WeightPlan) -> jax.Array:
            nonlocal done
            array = _load(leaf, tensors, mesh)
            done += sum(_num_bytes(tensors[source.name]) for sources in leaf.layers for source in sources)
            if progress is not None:
                progress(done, total)
            return array

        params: Params[jax.Array] = jax.tree.map(load, plan)
        return params


def _open(model_dir: Path, stack: ExitStack) -> dict[str, Any]:
    """Slices of every tensor in the checkpoint, by name."""
    index_path = model_dir / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, Mapping):
            raise CheckpointError(f"{index_path} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
    else:
        weight_map = {}
        names = ["model.safetensors"]
    tensors: dict[str, Any] = {}
    for name in names:
        path = model_dir / name
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from None
        tensors.update((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118 (not a mapping)
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise CheckpointError(f"{model_dir}: the index names weights that no file holds: {_listed(absent)}")
    return tensors


def _check(model_dir: Path, plan: Params[WeightPlan], tensors: Mapping[str, Any], tied: bool) -> None:
    expected = {source.name: source for source in _sources(plan)}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(f"{model_dir}: missing weights: {_listed(missing)}")
    known = {*expected, "lm_head.weight"} if tied else set(expected)
    unexpected = sorted(name for name in tensors if name not in known and not DERIVED.fullmatch(name))
    if unexpected:
        raise CheckpointError(f"{model_dir}: unexpected weights: {_listed(unexpected)}")
    for leaf in jax.tree.leaves(plan):
        for source in (source for sources in leaf.layers for source in sources):
            tensor = tensors[source.name]
            shape = (source.rows, *leaf.shape[2 if leaf.stacked else 1 :])
            if tuple(tensor.get_shape()) != shape:
                raise CheckpointError(
                    f"{model_dir}: {source.name} has shape {tensor.get_shape()}, config.json asks for {list(shape)}"
                )
            if tensor.get_dtype() not in ITEM_SIZES:
                raise CheckpointError(f"{model_dir}: {source.name} has unsupported dtype {tensor.get_dtype()}")


def _load(leaf: WeightPlan, tensors: Mapping[str, Any], mesh: Mesh) -> jax.Array:
    rows_axis = leaf.axes[1 if leaf.stacked else 0]
    num_shards = 1 if rows_axis is None else mesh.shape[rows_axis]

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        if not leaf.stacked:
            return _read_shard(leaf.layers[0], leaf, tensors, index, num_shards)
        first = _read_shard(leaf.layers[0], leaf, tensors, index[1:], num_shards)
        stack = np.empty((len(leaf.layers), *first.shape), first.dtype)
        stack[0] = first
        for layer, sources in enumerate(leaf.layers[1:], start=1):
            stack[layer] = _read_shard(sources, leaf, tensors, index[1:], num_shards)
        return stack

    return jax.make_array_from_callback(leaf.shape, sharding(mesh, leaf.axes), read)


def _read_shard(
    sources: tuple[Source, ...],
    leaf: WeightPlan,
    tensors: Mapping[str, Any],
    index: tuple[slice, ...],
    num_shards: int,
) -> np.ndarray:
    """One layer's shard at `index`: its part of each source, one under the other, in the leaf's dtype.

    Rows beyond the sources' are zero.
    """
    rows, *rest = index
    height = leaf.shape[1 if leaf.stacked else 0] // num_shards
    shard = (rows.start or 0) // height
    pieces = []
    for source in sources:
        share = height if len(sources) == 1 else source.rows // num_shards
        start = min(shard * share, source.rows)
        stop = min(start + share, source.rows)
        pieces.append(tensors[source.name][(slice(start, stop), *rest)])
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    joined = joined.astype(_numpy_dtype(leaf.dtype), copy=False)
    padding = height - joined.shape[0]
    return np.pad(joined, [(0, padding)] + [(0, 0)] * (joined.ndim - 1)) if padding else joined


def _sources(plan: Params[WeightPlan]) -> list[Source]:
    return [source for leaf in jax.tree.leaves(plan) for sources in leaf.layers for source in sources]


def _num_bytes(tensor: Any) -> int:
    return int(np.prod(tensor.get_shape())) * ITEM_SIZES[tensor.get_dtype()]


def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
