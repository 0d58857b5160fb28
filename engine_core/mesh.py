"""The device mesh and where arrays live on it.

Axes, each of a size that the configuration gives:
    "data"    batch rows
    "expert"  batch rows outside the experts of a MoE layer, and the experts themselves inside it
    "tensor"  heads, ffw columns and vocabulary

So the rows of a step, its slots and the pages of the cache are split over data x expert, the *row shards*: each runs
its own sequences through attention, on its own pages. Only MoE layers move rows between them, along "expert".

The step runs inside one `shard_map`, so its code sees local arrays, and each collective is a line of source that calls
a function below. Outside the step (page gathers, cache creation) the axes are Auto, so that such code needs no
annotation; `axis_types` is always passed, since its default differs between jax versions.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engine_core.config import Degrees
from engine_core.errors import ConfigError
from engine_core.models.spec import ModelSpec

DATA = "data"
EXPERT = "expert"
TENSOR = "tensor"
AXES = (DATA, EXPERT, TENSOR)
ROWS = (DATA, EXPERT)
"""The row shards, as one entry of a PartitionSpec."""


def make_mesh(degrees: Degrees, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over the first `degrees.num_devices` devices; neighbours on the tensor axis are neighbours in the list.

    Raises:
        ConfigError: there are fewer devices than that.
    """
    count = degrees.num_devices
    if count > len(devices):
        raise ConfigError(f"{degrees} needs {count} devices, there are {len(devices)}")
    grid = np.array(devices[:count], dtype=object).reshape(degrees.dp, degrees.ep, degrees.tp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replica_devices(degrees: Degrees) -> list[jax.Device]:
    """The devices of a replica: of this process, or of all processes of a worker over several hosts, host by host.

    Raises:
        ConfigError: several hosts, and their devices are not as many as the degrees need.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    hosts = jax.process_count()
    if hosts > 1 and (len(devices) != degrees.num_devices or len(jax.local_devices()) * hosts != len(devices)):
        raise ConfigError(
            f"{degrees} needs {degrees.num_devices} devices, equally many on each of {hosts} hosts; there are "
            f"{len(devices)}, of which {len(jax.local_devices())} are of this host"
        )
    return devices[: degrees.num_devices]


def kv_copies(num_kv_heads: int, tp: int) -> int:
    """Devices on the tensor axis that hold the same KV head: more than one where there are more devices than heads."""
    return max(1, tp // num_kv_heads)


def check_divisible(spec: ModelSpec, degrees: Degrees) -> None:
    """Refuse degrees that would split a head or a column of a dense MLP; a MoE layer checks its experts.

    Raises:
        ConfigError: naming the first size that a degree does not divide.
    """
    if degrees.tp % spec.num_kv_heads and spec.num_kv_heads % degrees.tp:
        raise ConfigError(
            f"tp {degrees.tp} neither divides the model's num_key_value_heads {spec.num_kv_heads} "
            "nor is a multiple of it"
        )
    sizes = {"num_attention_heads": spec.num_heads}
    if spec.moe is None or not all(spec.moe.layers):
        sizes["intermediate_size"] = spec.intermediate_size
    for name, size in sizes.items():
        if size % degrees.tp:
            raise ConfigError(f"tp {degrees.tp} does not divide the model's {name} {size}")
    if degrees.ep > 1 and spec.moe is None:
        raise ConfigError(f"ep is {degrees.ep} but {spec.architecture} has no experts; use tp or dp")


def num_row_shards(mesh: Mesh) -> int:
    """Parts into which rows, slots and pages are split."""
    return int(mesh.shape[DATA] * mesh.shape[EXPERT])


def sharding(mesh: Mesh, axes: Sequence[str | tuple[str, ...] | None]) -> NamedSharding:
    """Where an array with these mesh axes per dimension lives."""
    return NamedSharding(mesh, P(*axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Split over the row shards: slots and outputs."""
    return NamedSharding(mesh, P(ROWS))


def cache_axes(stacked: bool) -> tuple[str | tuple[str, ...] | None, ...]:
    """Mesh axes of one cache array `[(L,) num_pages, page_size, 2K/pack, pack, H]`: pages by rows, heads by tensor."""
    page = (ROWS, None, TENSOR, None, None)
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
