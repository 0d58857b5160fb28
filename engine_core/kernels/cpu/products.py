"""The entries to compiled products."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine_core.kernels.shapes import check_shapes

DEPTH_ALIGN = 32
"""What a row's length must be a multiple of: two vectors of the widest kind."""


GATED_ALIGN = 16
"""What the outputs of a gated product must be a multiple of."""


def gated(x: jax.Array, weight: jax.Array, target: str) -> jax.Array:
    """`silu(x @ gates.T) * (x @ others.T)`, accumulated in float32, without writing either: for more than 64 rows.

    Args:
        x: [T, in] bf16, `in` a multiple of DEPTH_ALIGN.
        weight: [2 * out, in] bf16: gates, then others; `out` a multiple of GATED_ALIGN.
        target: the kernel's name in XLA.

    Returns:
        [T, out] bf16.
    """
    check_shapes("T I", x, "O I", weight)
    shape = jax.ShapeDtypeStruct((len(x), len(weight) // 2), jnp.bfloat16)
    out: jax.Array = jax.ffi.ffi_call(target, shape)(x, weight)
    return out


def matmul(x: jax.Array, weight: jax.Array, target: str) -> jax.Array:
    """`x @ weight.T`, accumulated in float32; each row by itself, whatever its neighbours hold.

    Args:
        x: [T, in] in the weight's dtype, or f32 where that is bf16, and counts as if it were widened; `in` is a
            multiple of DEPTH_ALIGN.
        weight: [out, in] f32 or bf16.
        target: the kernel's name in XLA.

    Returns:
        [T, out] f32.
    """
    check_shapes("T I", x, "O I", weight)
    out: jax.Array = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((len(x), len(weight)), jnp.float32))(x, weight)
    return out
