"""TPU slices by the names that they are sold under: v6e-8, v5p-16, tpu7x-8."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine_core.aot.generation import GENERATIONS, Generation
from engine_core.errors import ConfigError

_FLAT = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBIC = ((1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8))
_GRIDS: dict[str, tuple[tuple[int, ...], ...]] = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBIC, "tpu7x": _CUBIC}


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """One slice.

    Attributes:
        name: "v6e-8"; the number counts chips on v5e and v6e, TensorCores on v5p and tpu7x, as Google does.
        generation: of its chips.
        grid: how the chips are wired.
    """

    name: str
    generation: Generation
    grid: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.grid)

    @property
    def num_devices(self) -> int:
        """What `len(jax.devices())` would be."""
        return self.num_chips * self.generation.devices_per_chip

    @property
    def host_grid(self) -> tuple[int, int, int]:
        """The chips of one host: four, or all where there are fewer."""
        return (min(2, self.grid[0]), min(2, self.grid[1]), 1)

    @property
    def libtpu_name(self) -> str:
        """The compiler's name of it: `v6e:2x4`."""
        return f"{self.generation.name}:{'x'.join(map(str, self.grid))}"


def topologies() -> tuple[Topology, ...]:
    """Every slice that can be named, those of a generation by ascending size."""
    return tuple(
        Topology(name=f"{name}-{math.prod(grid) * GENERATIONS[name].cores_per_name}", generation=generation, grid=grid)
        for name, generation in GENERATIONS.items()
        for grid in _GRIDS[name]
    )


def find_topology(name: str) -> Topology:
    """The slice of this name.

    Raises:
        ConfigError: unknown; the known ones are listed.
    """
    known = {topology.name: topology for topology in topologies()}
    if name not in known:
        raise ConfigError(f"unknown TPU topology {name!r}; known are {', '.join(known)}")
    return known[name]
