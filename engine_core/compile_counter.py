"""Counts XLA compilations after warm-up: each one is a stall that a bucket should have prevented."""

from __future__ import annotations

from typing import Any

import jax.monitoring

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts from `start` on. Compilation is a property of the process: all engines in it share what is seen."""

    def __init__(self) -> None:
        self.count = 0
        self._counting = False
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def start(self) -> None:
        """Warm-up is over."""
        self._counting = True

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if self._counting and event == _COMPILE_EVENT:
            self.count += 1
