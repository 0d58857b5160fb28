"""Compiling a jitted function with libtpu for a slice that is not there, and reading what came out.

libtpu is a plain shared library: it compiles on any Linux machine, without a TPU. It reads its environment once, so
this belongs in a child process that was started with `environment.compiler_environment`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from engine_core.aot.environment import require_libtpu
from engine_core.aot.topology import Topology
from engine_core.errors import ConfigError


def describe_devices(topology: Topology) -> list[Any]:
    """The devices of a slice, for shardings and meshes; nothing can run on them.

    Raises:
        ConfigError: libtpu is missing or refuses the slice.
    """
    require_libtpu()
    try:
        devices = topologies.get_topology_desc(
            topology_name=topology.libtpu_name, platform="tpu", chips_per_host_bounds=list(topology.host_grid)
        ).devices
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"libtpu knows no topology {topology.name} ({topology.libtpu_name}): {error}") from error
    return list(devices)


@contextlib.contextmanager
def tracing_for(device: Any) -> Iterator[None]:
    """While a function is traced and lowered: Pallas asks which TPU it is for, and jax answers with this device's kind.

    The mesh's one axis bears a name that no model uses; `shard_map` and `in_shardings` bring their own meshes.
    """
    target = AbstractDevice(platform="tpu", device_kind=device.device_kind, num_cores=device.num_cores)
    mesh = AbstractMesh((1,), ("aot",), axis_types=(AxisType.Auto,), abstract_device=target)
    with jax.sharding.use_abstract_mesh(mesh):
        yield
