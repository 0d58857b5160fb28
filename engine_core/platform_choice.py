"""Which platforms jax may look for devices on, settled before it looks."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import jax

_PLUGINS = "jax_plugins"  # the entry points by which a package brings jax another accelerator (CUDA, ROCm)
_TPU_NODES = ("accel[0-9]*", "vfio/[0-9]*")


def choose_platforms() -> None:
    """Leave jax to the CPU where no accelerator can be there; elsewhere, and where the user chose, change nothing.

    jax tries every platform that is installed: where that is libtpu and there is no TPU, as on a machine that compiles
    for one (`baton plan`), libtpu asks the network what the machine is and prints a page of errors.
    """
    config: Any = jax.config  # whose type lacks its options
    if config.jax_platforms or has_tpu(Path("/dev")) or metadata.entry_points(group=_PLUGINS):
        return
    config.update("jax_platforms", "cpu")


def has_tpu(devices: Path) -> bool:
    """Whether a TPU may be attached. Where jax knows its PCI id, it has chosen the TPU at its import.

    Args:
        devices: the directory of device nodes.
    """
    return any(next(devices.glob(pattern), None) is not None for pattern in _TPU_NODES)
