"""Checkpoints: reading safetensors straight into sharded device arrays.

Each device's part of a weight is read once, cast on the host, and put on that device; no tensor is ever held whole on a
device that keeps only a part of it.
"""

from __future__ import annotations

import itertools
import math
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
        tensors = _unfuse(_open(model_dir, stack), plan)
        _check(model_dir, plan, tensors, model.spec.tie_embeddings)
        total = sum(_num_bytes(tensors[source.name]) for source in _sources(plan))
        done = 0

        def load(leaf: WeightPlan) -> jax.Array:
            nonlocal done
            array = _load(leaf, tensors, mesh)
            done += sum(_num_bytes(tensors[source.name]) for part in leaf.parts for source in part)
            if progress is not None:
                progress(done, total)
            return array

        params: Params[jax.Array] = jax.tree.map(load, plan)
        return params


def stored_dtype(model_dir: Path) -> str:
    """Dtype in which a checkpoint's matrices can be held without loss: "bfloat16" where it stores all of them so.

    Raises:
        CheckpointError: a file is missing or truncated.
    """
    with ExitStack() as stack:
        matrices = [tensor for tensor in _open(model_dir, stack).values() if len(tensor.get_shape()) > 1]
        return "bfloat16" if all(tensor.get_dtype() == "BF16" for tensor in matrices) else "float32"


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
        for source in itertools.chain.from_iterable(leaf.parts):
            tensor = tensors[source.name]
            rows, *rest = leaf.shape[len(leaf.stack) :]
            shape = (source.rows, rows) if leaf.transposed else (source.rows, *rest)
            if tuple(tensor.get_shape()) != shape:
                raise CheckpointError(
                    f"{model_dir}: {source.name} has shape {tensor.get_shape()}, config.json asks for {list(shape)}"
                )
            if tensor.get_dtype() not in ITEM_SIZES:
                raise CheckpointError(f"{model_dir}: {source.name} has unsupported dtype {tensor.get_dtype()}")


def _load(leaf: WeightPlan, tensors: Mapping[str, Any], mesh: Mesh) -> jax.Array:
    depth = len(leaf.stack)
    rows_axis = leaf.axes[depth]
    num_shards = mesh.shape[rows_axis] if isinstance(rows_axis, str) else 1
    shards: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = str(index)  # devices that hold the same part share one reading of it
        if key not in shards:
            shards[key] = _read_stack(leaf, tensors, index[:depth], index[depth:], num_shards)
        return shards[key]

    return jax.make_array_from_callback(leaf.shape, sharding(mesh, leaf.axes), read)


def _read_stack(
    leaf: WeightPlan,
    tensors: Mapping[str, Any],
    stack: tuple[slice, ...],
    index: tuple[slice, ...],
    num_shards: int,
) -> np.ndarray:
    """The shards at `index` of those matrices that `stack` selects."""
    ranges = [range(*part.indices(size)) for part, size in zip(stack, leaf.stack, strict=True)]
    shard: np.ndarray | None = None
    for place in itertools.product(*(range(len(chosen)) for chosen in ranges)):
        number = 0
        for chosen, at, size in zip(ranges, place, leaf.stack, strict=True):
            number = number * size + chosen[at]
        if leaf.transposed:
            tensor = tensors[leaf.parts[number][0].name]
            matrix: np.ndarray = tensor[index[::-1]].T.astype(_numpy_dtype(leaf.dtype))
        else:
            matrix = _read_shard(leaf.parts[number], leaf, tensors, index, num_shards)
        if not ranges:
            return matrix
        if shard is None:
            shard = np.empty((*map(len, ranges), *matrix.shape), matrix.dtype)
        shard[place] = matrix
    assert shard is not None
    return shard


def _read_shard(
    sources: tuple[Source, ...],
    leaf: WeightPlan,
    tensors: Mapping[str, Any],
    index: tuple[slice, ...],
    num_shards: int,
) -> np.ndarray:
    """One matrix's shard at `index`: its part of each source, one under the other, in the leaf's dtype.

    Rows beyond the sources' are zero.
    """
    rows, *rest = index
    height = leaf.shape[len(leaf.stack)] // num_shards
    shard = (rows.start or 0) // height
    pieces = []
    for source in sources:
        share = height if len(sources) == 1 else source.rows * source.copies // num_shards
        start = min(shard // source.copies * share, source.rows)
        stop = min(start + share, source.rows)
        pieces.append(tensors[source.name][(slice(start, stop), *rest)])
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    joined = joined.astype(_numpy_dtype(leaf.dtype), copy=False)
    padding = height - joined.shape[0]
    return np.pad(joined, [(0, padding)] + [(0, 0)] * (joined.ndim - 1)) if padding else joined


class _FusedRows:
    """A view of some rows of a checkpoint tensor, with the interface of a safetensors slice."""

    def __init__(self, tensor: Any, source: Source) -> None:
        assert source.fused is not None
        self._tensor = tensor
        self._fused = source.fused
        self._rows = source.rows

    def get_shape(self) -> list[int]:
        """Shape of the view; where the tensor's leading dimensions are not as expected, the tensor's own."""
        shape: list[int] = self._tensor.get_shape()
        depth = len(self._fused.leading)
        return [self._rows, *shape[depth:]] if tuple(shape[:depth]) == self._fused.leading else shape

    def get_dtype(self) -> str:
        """Safetensors' name of the element type."""
        return str(self._tensor.get_dtype())

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read a part; only these bytes are touched."""
        rows, *rest = index
        first, last, _ = rows.indices(self._rows)
        inside = slice(self._fused.start + first, self._fused.start + last)
        lead = [slice(place, place + 1) for place in self._fused.index]
        read: np.ndarray = self._tensor[(*lead, inside, *rest)]
        return read.reshape(read.shape[len(lead) :])


def _unfuse(tensors: dict[str, Any], plan: Params[WeightPlan]) -> dict[str, Any]:
    """Give the rows of fused tensors the names that the plan asks for, and drop the fused ones."""
    absent = [source for source in _sources(plan) if source.fused is not None and source.name not in tensors]
    found = {s.name: _FusedRows(tensors[s.fused.name], s) for s in absent if s.fused and s.fused.name in tensors}
    taken = {source.fused.name for source in absent if source.fused is not None}
    return {name: tensor for name, tensor in tensors.items() if name not in taken} | found


def _sources(plan: Params[WeightPlan]) -> list[Source]:
    return [source for leaf in jax.tree.leaves(plan) for part in leaf.parts for source in part]


def _num_bytes(tensor: Any) -> int:
    shape: list[int] = tensor.get_shape()
    return math.prod(shape) * ITEM_SIZES[tensor.get_dtype()]


def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
