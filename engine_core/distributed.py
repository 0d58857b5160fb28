"""Processes of one worker as one JAX program."""

from __future__ import annotations

from typing import Any

import jax

from engine_core.errors import ConfigError
from engine_core.platform_choice import choose_platforms


def join(coordinator: str, num_hosts: int, number: int, timeout_s: float) -> None:
    """Become process `number` of `num_hosts`; before any device is looked at. Waits for the others
    and opens the devices.

    Args:
        coordinator: "host:port" where process 0 listens for all.
        num_hosts: processes.
        number: of this one, from 0.
        timeout_s: for the others to come.

    Raises:
        ConfigError: they did not.
    """
    choose_platforms()
    config: Any = jax.config  # whose type lacks its options
    config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_hosts,
            number,
            initialization_timeout=int(timeout_s),
            coordinator_bind_address=coordinator if number == 0 else None,  # else it listens on every interface
        )
        jax.devices()  # here: each process waits until all others have looked, too
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"host {number} of {num_hosts} cannot join the others at {coordinator}: {reason}") from None
    if jax.process_index() != number:
        raise ConfigError(f"host {number} of {num_hosts} is number {jax.process_index()} of its TPU slice")
