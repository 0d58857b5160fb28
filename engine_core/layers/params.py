"""How modules declare weights, and how a module becomes plain leaves.

A module never holds arrays of its own: it declares shapes, and `Template` rebuilds it around leaves inside the traced
step. So the jitted step takes plain tuples (cheap to dispatch), and the same template serves every layer of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
from flax import nnx

M = TypeVar("M", bound=nnx.Module)
Leaves = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor: its name within the module's prefix, and its length along dimension 0."""

    name: str
    rows: int


@dataclass(frozen=True)
class ParamSpec:
    """One declared weight.

    Attributes:
        shape: global shape. Dimension 0 may exceed the sum of the sources' rows: the rest is zero (vocabulary padding).
        dtype: of the stored array.
        axes: mesh axis of each dimension, None where it is whole on every device.
        sources: checkpoint tensors that are fused along dimension 0. When that dimension is sharded, each shard holds
            its part of every source, in this order: a local split is a split of the local array.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class WeightPlan:
    """One leaf of a model's `Params`: where it comes from and how it lies.

    Attributes:
        shape: global shape, with the leading layer dimension where the leaf is stacked.
        dtype: of the stored array.
        axes: mesh axis of each dimension.
        layers: per layer (one entry where the leaf is not stacked) its fused sources, by absolute checkpoint name.
        stacked: whether there is a leading layer dimension.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    layers: tuple[tuple[Source, ...], ...]
    stacked: bool


def plan_weight(spec: ParamSpec, prefixes: Sequence[str], stacked: bool) -> WeightPlan:
    """The leaf of a declared weight, its checkpoint names under one prefix per layer."""
    assert stacked or len(prefixes) == 1
    layers = tuple(tuple(Source(prefix + source.name, source.rows) for source in spec.sources) for prefix in prefixes)
    if not stacked:
        return WeightPlan(spec.shape, spec.dtype, spec.axes, layers, stacked)
    return WeightPlan((len(prefixes), *spec.shape), spec.dtype, (None, *spec.axes), layers, stacked)


def declare(spec: ParamSpec) -> nnx.Param[jax.Array]:
    """A parameter without a value, for a module's `__init__`."""
    shape: Any = jax.ShapeDtypeStruct(spec.shape, spec.dtype)  # flax types values only, and accepts shapes
    return nnx.Param(shape, spec=spec)


class Template(Generic[M]):
    """A module, split once into structure (kept here) and leaves (passed by the caller).

    Attributes:
        params: what was declared, in the order of the leaves.
    """

    def __init__(self, module: M) -> None:
        self._graphdef, state = nnx.split(module)
        leaves, self._treedef = jax.tree.flatten(state)
        variables = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        assert len(variables) == len(leaves)
        self.params: tuple[ParamSpec, ...] = tuple(variable.get_metadata("spec") for variable in variables)

    def bind(self, leaves: Sequence[jax.Array]) -> M:
        """The module around these leaves (local shards inside shard_map). Costs nothing in a compiled step."""
        module: M = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))
        return module
