"""Rotary position embedding, in Hugging Face's half-split form."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from engine_core.models.spec import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each rotated pair: [H / 2] f32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    return frequencies if scaling is None else scale_llama3(frequencies, scaling)


def scale_llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's rule: long waves are slowed by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_position / scaling.low_freq_factor
    shortest = scaling.original_max_position / scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = np.where(wavelengths > longest, frequencies / scaling.factor, between)
    return np.where(wavelengths < shortest, frequencies, scaled).astype(np.float32)


def rotation(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, shared by all layers of a step: positions [T] i32 -> two [T, 1, H / 2] f32."""
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate dimension i with dimension i + H / 2.

    Args:
        x: [T, heads, H] f32.
        cos: [T, 1, H / 2] f32.
        sin: [T, 1, H / 2] f32.

    Returns:
        [T, heads, H] f32.
    """
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
