"""How modules declare weights, and how a module becomes plain leaves.

A module never holds arrays of its own: it declares shapes, and `Template` rebuilds it around leaves inside the traced
step. So the jitted step takes plain tuples (cheap to dispatch), and the same template serves every layer of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import jax
from flax import nnx

M = TypeVar("M", bound=nnx.Module)
Leaves = tuple[jax.Array, ...]
Axis = str | tuple[str, ...] | None
"""Mesh axes over which a dimension is split."""


@dataclass(frozen=True)
class FusedSource:
    """Where newer checkpoints hold a tensor: as rows of a larger one.

    Attributes:
        name: of the larger tensor, within the module's prefix.
        leading: its shape, up to and with the dimension of the rows.
        index: place along the dimensions before that one (an expert).
        start: first row.
    """

    name: str
    leading: tuple[int, ...]
    index: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor: its name within the module's prefix, and its length along dimension 0.

    Attributes:
        fused: where to look when the checkpoint has no tensor of that name.
        copies: neighbouring shards that hold the same rows.
    """

    name: str
    rows: int
    fused: FusedSource | None = None
    copies: int = 1

    def under(self, prefix: str) -> Source:
        """The same with absolute names."""
        fused = None if self.fused is None else replace(self.fused, name=prefix + self.fused.name)
        return replace(self, name=prefix + self.name, fused=fused)


@dataclass(frozen=True)
class ParamSpec:
    """One declared weight.

    A weight is a matrix (or vector), or a stack of them along leading dimensions (experts).

    Attributes:
        shape: global shape. Behind the stack's dimensions, the first one may exceed the sum of the sources' rows: the
            rest is zero (vocabulary padding).
        dtype: of the stored array.
        axes: mesh axis of each dimension, None where it is whole on every device.
        sources: checkpoint tensors that are fused along that dimension. When it is sharded, each shard holds its part
            of every source, in this order: a local split is a split of the local array. For a stack: the sources of
            each matrix, one matrix after the other.
        stack: sizes of the leading dimensions that stack matrices; empty for a single one.
        transposed: matrices are stored as `[in, out]`, with one source each, which the checkpoint has as `[out, in]`.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[Axis, ...]
    sources: tuple[Source, ...]
    stack: tuple[int, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class WeightPlan:
    """One leaf of a model's `Params`: where it comes from and how it lies.

    Attributes:
        shape: global shape, with the leading layer dimension where layers are stacked.
        dtype: of the stored array.
        axes: mesh axis of each dimension.
        stack: sizes of the leading dimensions that stack matrices: layers, experts, both (in this order) or none.
        transposed: see `ParamSpec`.
        parts: per matrix of the stack, in row-major order, its fused sources by absolute checkpoint name.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[Axis, ...]
    stack: tuple[int, ...]
    transposed: bool
    parts: tuple[tuple[Source, ...], ...]


def plan_weight(spec: ParamSpec, prefixes: Sequence[str], stacked: bool) -> WeightPlan:
    """The leaf of a declared weight, its checkpoint names under one prefix per layer."""
    assert stacked or len(prefixes) == 1
    matrices = math.prod(spec.stack)
    fused = len(spec.sources) // matrices
    assert fused == 1 or not spec.transposed
    parts = tuple(
        tuple(source.under(prefix) for source in spec.sources[fused * i : fused * (i + 1)])
        for prefix in prefixes
        for i in range(matrices)
    )
    layers = (len(prefixes),) if stacked else ()
    return WeightPlan(
        shape=(*layers, *spec.shape),
        dtype=spec.dtype,
        axes=(*(None for _ in layers), *spec.axes),
        stack=(*layers, *spec.stack),
        transposed=spec.transposed,
        parts=parts,
    )


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
