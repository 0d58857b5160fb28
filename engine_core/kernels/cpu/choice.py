"""Where the compiled kernels are used: measured once per process, not guessed from the CPU's name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engine_core.kernels.cpu import products
from engine_core.kernels.cpu.library import Library

_PROBED_ROWS = (1, 4, 16, 64, 256)
_DEPTH = 2048
_WEIGHTS = {row: 16384 if row <= 64 else 2048 for row in _PROBED_ROWS}  # few rows: more than a cache holds
_ROUNDS = 4
_FEW_ROWS = 64  # up to which the weights of a product are multiplied where they lie, which a gated one does not do
_GAIN = 0.95  # of XLA's time, that a kernel must stay below to be worth its place

Product = Callable[[jax.Array, jax.Array], jax.Array]
"""(x: [T, in], weight: [out, in]) -> [T, out] f32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuKernels:
    """Compiled kernels, and where they are the faster. Attention always is: XLA:CPU runs it on one core.

    Attributes:
        library: registered.
        rows: of `_PROBED_ROWS`, those at which products are.
        weight: dtype of weights with which they are.
    """

    library: Library
    rows: tuple[int, ...]
    weight: str

    def multiplies(self, x: jax.Array) -> bool:
        """Whether the product of x: [T, in] is for them: as at the most rows probed that are not above T."""
        probed = max(row for row in _PROBED_ROWS if row <= max(1, x.shape[0]))
        return x.shape[1] % products.DEPTH_ALIGN == 0 and probed in self.rows

    def gated(self, x: jax.Array, weight: jax.Array) -> str | None:
        """Name of the gated product of x: [T, in] with weight: [2 * out, in], where there is one that is worth it."""
        fits = x.shape[1] % products.DEPTH_ALIGN == 0 and weight.shape[0] % (2 * products.GATED_ALIGN) == 0
        is_worth = x.shape[0] > _FEW_ROWS and x.dtype == weight.dtype == jnp.bfloat16
        return self.library.gated if fits and is_worth else None


def choose_kernels(library: Library, dtype: str, stored: str, in_xla: Product) -> CpuKernels:
    """Time products of both kinds, in turn.

    Weights that a checkpoint stores narrower than is computed stay so where compiled products are the faster at all row
    counts: XLA would widen them each time.

    Args:
        library: registered.
        dtype: of computation.
        stored: of the checkpoint's matrices, "float32" or "bfloat16".
        in_xla: takes x and weights of `dtype`.
    """

    def compiled(x: jax.Array, weight: jax.Array) -> jax.Array:
        return products.matmul(x, weight, library.matmul)

    ours, theirs = jax.jit(compiled), jax.jit(in_xla)
    if (dtype, stored) == ("float32", "bfloat16"):
        narrow = CpuKernels(library=library, rows=_faster(ours, theirs, dtype, stored), weight=stored)
        if narrow.rows == _PROBED_ROWS:
            return narrow
    return CpuKernels(library=library, rows=_faster(ours, theirs, dtype, dtype), weight=dtype)


def _faster(ours: Product, theirs: Product, dtype: str, held: str) -> tuple[int, ...]:
    """The row counts at which our product, of weights held in a dtype, is faster than theirs, of weights in `dtype`."""
    faster = []
    for rows in _PROBED_ROWS:
        x = jnp.full((rows, _DEPTH), 0.5, dtype)
        weight = jnp.full((_WEIGHTS[rows], _DEPTH), 0.5, dtype)
        own, others = _best_times(x, (ours, weight.astype(held)), (theirs, weight))
        if own < _GAIN * others:
            faster.append(rows)
    return tuple(faster)


def _best_times(x: jax.Array, *pairs: tuple[Product, jax.Array]) -> list[float]:
    """Seconds of each one's best run, the first one (which compiles) left out."""
    best = [float("inf")] * len(pairs)
    for turn in range(_ROUNDS + 1):
        for i, (function, weight) in enumerate(pairs):
            start = time.perf_counter()
            function(x, weight).block_until_ready()
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return best
