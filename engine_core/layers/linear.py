"""Matrix products: the one place that decides how weights are stored and multiplied.

Weights keep Hugging Face's orientation `[out, in]`. On XLA:CPU (jax 0.10 and 0.12, 2 cores, Qwen3-0.6B shapes) a bf16
product with it streams 17 GB/s of weights from 4 rows on, against 9 GB/s with `[in, out]`; below 4 rows it falls to
2 GB/s, so such batches are padded. Compiled kernels take the same orientation (`engine_core.kernels.cpu`). On TPU and
GPU it is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from engine_core import mesh
from engine_core.kernels.cpu import products
from engine_core.kernels.cpu.choice import CpuKernels
from engine_core.layers.params import ParamSpec, Source, declare


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """Dtypes of the computation, and what matrix products need to be fast.

    Attributes:
        compute: dtype of matmul inputs and of queries, keys and values.
        weight: dtype in which matrices are held, but for experts; where it is the narrower, compiled products widen it.
        residual: dtype of activations between matmuls.
        min_rows: a product in XLA with fewer rows is padded to this many.
        kernels: compiled ones, to use where they are the faster; None: XLA does all.
    """

    compute: str
    weight: str
    residual: str
    min_rows: int
    kernels: CpuKernels | None

    def held(self, depth: int) -> str:
        """Dtype of a matrix whose products on a device are `depth` long: a narrow one must be for compiled products."""
        return self.weight if depth % products.DEPTH_ALIGN == 0 else self.compute


def choose_numbers(compute: str, platform: str) -> Numbers:
    """How to compute in `compute` ("float32" or "bfloat16") on a platform ("cpu", "gpu", "tpu"), by XLA alone."""
    if platform != "cpu" or compute == "float32":
        return Numbers(compute=compute, weight=compute, residual=compute, min_rows=1, kernels=None)
    return Numbers(compute=compute, weight=compute, residual="float32", min_rows=4, kernels=None)


def matmul(x: jax.Array, weight: jax.Array, numbers: Numbers) -> jax.Array:
    """`x @ weight.T`, accumulated in f32.

    Args:
        x: [T, in] any float dtype; rounded to that of computation.
        weight: [out, in], no wider than that.
        numbers: how to compute.

    Returns:
        [T, out] f32.
    """
    rows = x.shape[0]
    x = x.astype(numbers.compute)
    if numbers.kernels is not None and numbers.kernels.multiplies(x):
        return products.matmul(x, weight, numbers.kernels.library.matmul)
    if rows < numbers.min_rows:
        x = jnp.pad(x, ((0, numbers.min_rows - rows), (0, 0)))
    weight = weight.astype(numbers.compute)
    exact = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(x, weight, contract, precision=exact, preferred_element_type=jnp.float32)
    return y[:rows]


class ColumnLinear(nnx.Module):
    """Products that share an input, fused into one; their output columns are sharded over the tensor axis.

    No collective: every device computes its own columns of each source.
    """

    def __init__(
        self, sources: Sequence[Source], in_size: int, biases: Sequence[Source], numbers: Numbers, tp: int
    ) -> None:
        out_size = sum(source.rows * source.copies for source in sources)
        self.weight = declare(
            ParamSpec((out_size, in_size), numbers.held(in_size), (mesh.TENSOR, None), tuple(sources)),
        )
        self.bias = declare(ParamSpec((out_size,), "float32", (mesh.TENSOR,), tuple(biases))) if biases else None
        self.numbers = numbers
        self.splits = tuple(source.rows * source.copies // tp for source in sources)

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """[T, in] -> one [T, rows * copies / tp] f32 per source."""
        y = self.fused(x)
        ends = [sum(self.splits[: i + 1]) for i in range(len(self.splits) - 1)]
        return jnp.split(y, ends, axis=-1)

    def fused(self, x: jax.Array) -> jax.Array:
        """The same as one array, source after source: XLA:CPU copies what a kernel takes a part of."""
        y = matmul(x, self.weight[...], self.numbers)
        return y if self.bias is None else y + self.bias[...]


class RowLinear(nnx.Module):
    """A product whose input columns are sharded over the tensor axis: ends in one all-reduce."""

    def __init__(self, source: Source, in_size: int, numbers: Numbers, tp: int) -> None:
        held = numbers.held(in_size // tp)
        self.weight = declare(ParamSpec((source.rows, in_size), held, (None, mesh.TENSOR), (source,)))
        self.numbers = numbers
        self.tp = tp

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, in / tp] -> [T, out] in the residual dtype, equal on every device."""
        return mesh.all_reduce(matmul(x, self.weight[...], self.numbers).astype(self.numbers.residual), self.tp)
