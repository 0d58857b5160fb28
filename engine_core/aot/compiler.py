"""Compiling a jitted function with libtpu for a slice that is not there, and reading what came out.

libtpu is a plain shared library: it compiles on any Linux machine, without a TPU. Call `environment` before the process
imports jax (the CLI and the benchmarks start a child process with it): libtpu reads its flags once per process.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from engine_core.aot.topology import Topology
from engine_core.errors import ConfigError


def require_libtpu() -> None:
    """Refuse early, and say what to install.

    Raises:
        ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "compiling for a TPU needs libtpu, which is not installed: pip install 'baton[aot]' "
            "(or pip install -e '.[aot]' in a checkout); no TPU is needed"
        )


def describe_devices(topology: Topology) -> list[Any]:
    """The devices of a slice, for shardings and meshes; nothing can run on them.

    Raises:
        ConfigError: libtpu is missing or refuses the slice.
    """
    require_libtpu()
    try:
        devices = topologies.get_topology_desc(topology_name=topology.libtpu_name, platform="tpu").devices
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
