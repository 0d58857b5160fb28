"""The device mesh and where arrays live on it.

Axes: "data" (replicas of a batch), "expert" (MoE experts), "tensor" (heads, ffw and vocabulary). Dense models use
"tensor" only; the others have size 1.

The step runs inside one `shard_map`, so its code sees local arrays, and each collective is a line of source that calls
`all_reduce` or `all_gather` below. Outside the step (page gathers, cache creation) the axes are Auto, so that such code
needs no annotation; `axis_types` is always passed, since its default differs between jax versions.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engine_core.errors import ConfigError
from engine_core.models.spec import ModelSpec

AXES = ("data", "expert", "tensor")
TENSOR = "tensor"


def make_mesh(tp: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over the first `tp` devices, all on the tensor axis.

    Raises:
        ConfigError: there are fewer devices than that.
    """
    if tp > len(devices):
        raise ConfigError(f"tp {tp} needs {tp} devices, there are {len(devices)}")
    grid = np.array(devices[:tp], dtype=object).reshape(1, 1, tp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def tensor_parallelism(mesh: Mesh) -> int:
    """Devices on the tensor axis."""
    return int(mesh.shape[TENSOR])


def check_divisible(spec: ModelSpec, tp: int) -> None:
    """Refuse a tensor-parallel degree that would split a head or a ffw column.

    Raises:
        ConfigError: naming the first size that `tp` does not divide.
    """
    sizes = {
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "intermediate_size": spec.intermediate_size,
    }
    for name, size in sizes.items():
        if size % tp:
            raise ConfigError(f"tp {tp} does not divide the model's {name} {size}")


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Where an array with these mesh axes per dimension lives."""
    return NamedSharding(mesh, P(*axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device: step inputs, slots and outputs."""
    return NamedSharding(mesh, P())


def cache_axes(stacked: bool) -> tuple[str | None, ...]:
    """Mesh axes of one cache array `[(L_seg,) num_pages, page_size, 2K/pack, pack, H]`: KV heads over tensor."""
    page = (None, None, TENSOR, None, None)
    return (None, *page) if stacked else page


def all_reduce(x: jax.Array, tp: int) -> jax.Array:
    """Sum over the tensor axis; inside the step's shard_map."""
    return jax.lax.psum(x, TENSOR) if tp > 1 else x


def all_gather(x: jax.Array, tp: int) -> jax.Array:
    """Concatenate the last dimension over the tensor axis; inside the step's shard_map."""
    return jax.lax.all_gather(x, TENSOR, axis=x.ndim - 1, tiled=True) if tp > 1 else x


def shard_index(tp: int) -> jax.Array | int:
    """This device's place on the tensor axis; inside the step's shard_map."""
    return jax.lax.axis_index(TENSOR) if tp > 1 else 0
