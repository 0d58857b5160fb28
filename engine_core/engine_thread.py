"""The thread that owns an engine: it runs posted commands and then ticks a scheduler, for as long as there is work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

logger = logging.getLogger(__name__)

IDLE_TICK_S = 0.25  # leases and deadlines are looked at this often when nothing else happens


class EngineThread:
    """Commands from any thread, executed on one.

    Args:
        tick: one round of scheduling; returns whether another should follow at once.
        on_crash: told the exception that ended the thread.
    """

    def __init__(self, tick: Callable[[], bool], on_crash: Callable[[BaseException], None]) -> None:
        self._tick = tick
        self._on_crash = on_crash
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.num_rounds = 0
        """Of ticks begun; it grows several times a second while nothing hangs."""

    def start(self) -> None:
        """Begin ticking."""
        self._thread.start()

    def post(self, command: Callable[[], None]) -> None:
        """Run `command` on the engine thread before its next tick. Thread-safe."""
        self._commands.put(command)

    def stop(self, timeout_s: float) -> None:
        """End the thread after the tick it is in."""
        self._commands.put(None)
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        busy = False
        try:
            while self._run_commands(wait=not busy):
                self.num_rounds += 1
                busy = self._tick()
        except BaseException as error:
            logger.exception("the engine thread stops")
            self._on_crash(error)
            raise

    def _run_commands(self, *, wait: bool) -> bool:
        """Run what has been posted. False when asked to stop."""
        try:
            command = self._commands.get(block=wait, timeout=IDLE_TICK_S if wait else None)
            while True:
                if command is None:
                    return False
                command()
                command = self._commands.get_nowait()
        except Empty:
            return True
