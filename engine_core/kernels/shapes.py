"""Shape checks at the boundaries of device code; they run while tracing and cost nothing once compiled."""

from __future__ import annotations

import jax


def check_shapes(*specs_and_arrays: str | jax.Array) -> None:
    """Check arrays against dimension names, given alternately: `check_shapes("T N H", q, "T K H", k)`.

    A name keeps the size it first had; a number must match itself.

    Raises:
        ValueError: such as `[T N H]: N is 5 but was 4`.
    """
    sizes: dict[str, int] = {}
    for spec, array in zip(specs_and_arrays[::2], specs_and_arrays[1::2], strict=True):
        assert isinstance(spec, str) and not isinstance(array, str), "a spec, then its array"
        names = spec.split()
        if len(names) != array.ndim:
            raise ValueError(f"[{spec}]: the array has shape {array.shape}")
        for name, size in zip(names, array.shape, strict=True):
            expected = int(name) if name.isdigit() else sizes.setdefault(name, size)
            if size != expected:
                raise ValueError(f"[{spec}]: {name} is {size} but was {expected}")
