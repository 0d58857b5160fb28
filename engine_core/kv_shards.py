"""Which KV heads of a page each host holds, where the devices of a replica belong to several processes.

Off the device, a page is `[page_size, 2K, H]` (`kv_cache.gather_pages`); a host moves those of its heads that its own
devices hold and never sees the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engine_core.errors import ConfigError
from engine_core.host_commands import KvHeads
from engine_core.mesh import TENSOR, kv_copies

_HEADS_AXIS = 2


@dataclass(frozen=True, slots=True)
class KvShards:
    """Where gathered pages live.

    Attributes:
        sharding: of `[n, page_size, 2K, H]`, heads split over devices as the cache's are, copies of a head equal.
        held: KV heads of each process, in the order of their numbers.
        exported: the same, but each head once: what each process hands over.
    """

    sharding: NamedSharding
    held: tuple[KvHeads, ...]
    exported: tuple[KvHeads, ...]

    @classmethod
    def of(cls, mesh: Mesh, num_kv_heads: int) -> KvShards:
        """Of a replica's mesh.

        Raises:
            ConfigError: the devices of a process do not hold neighbouring heads.
        """
        tp = mesh.shape[TENSOR]
        copies = kv_copies(num_kv_heads, tp)
        grid = mesh.devices.reshape(-1, tp // copies, copies)
        by_heads = Mesh(grid, ("rows", "heads", "copies"), axis_types=(AxisType.Auto,) * 3)
        sharding = NamedSharding(by_heads, P(None, None, "heads", None))
        held = _held(sharding, num_kv_heads)
        exported, done = [], 0
        for heads in held:
            end = heads.first + heads.count
            exported.append(KvHeads(max(heads.first, done), max(0, end - max(heads.first, done))))
            done = max(done, end)
        return cls(sharding, held, tuple(exported))

    @property
    def own(self) -> KvHeads:
        """Held by this process."""
        return self.held[jax.process_index()]

    def assemble(self, layers: Sequence[np.ndarray], first_head: int, num_kv_heads: int) -> tuple[jax.Array, ...]:
        """Global arrays of which this process gives its part.

        Args:
            layers: per layer `[n, page_size, 2k, H]`, the k heads from `first_head` on; at least those held here.
            first_head: see `layers`.
            num_kv_heads: K.
        """

        def place(layer: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                start, stop, _ = index[_HEADS_AXIS].indices(2 * num_kv_heads)
                return layer[:, :, start - 2 * first_head : stop - 2 * first_head]

            shape = (*layer.shape[:2], 2 * num_kv_heads, layer.shape[3])
            return jax.make_array_from_callback(shape, self.sharding, part)

        return tuple(place(layer) for layer in layers)


def local_parts(layer: jax.Array) -> tuple[jax.Array, ...]:
    """The parts of a gathered layer that this process's devices hold, each once, in the order of their heads."""
    parts = {shard.index[_HEADS_AXIS].start or 0: shard.data for shard in layer.addressable_shards}
    return tuple(parts[start] for start in sorted(parts))


def _held(sharding: NamedSharding, num_kv_heads: int) -> tuple[KvHeads, ...]:
    heads: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = sharding.devices_indices_map((1, 1, 2 * num_kv_heads, 1))
    for device, index in places.items():
        start, stop, _ = index[_HEADS_AXIS].indices(2 * num_kv_heads)
        heads.setdefault(device.process_index, set()).update(range(start // 2, stop // 2))
    ranges = []
    for process in sorted(heads):
        first, count = min(heads[process]), len(heads[process])
        if heads[process] != set(range(first, first + count)):
            raise ConfigError(f"the devices of host {process} hold KV heads {sorted(heads[process])}, with gaps")
        ranges.append(KvHeads(first, count))
    return tuple(ranges)
