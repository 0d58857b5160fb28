"""Work on several CPU devices, in a process of its own: their number is fixed when jax starts."""

from __future__ import annotations

import os
from typing import Any

from tests.child import lines_of


def results_of(module: str, num_devices: int, *arguments: str) -> list[dict[str, Any]]:
    """The lines of JSON that a module of this package prints."""
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return lines_of(f"tests.engine_core.{module}", environment, *arguments, timeout_s=280)
