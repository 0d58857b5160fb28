"""What a person sees while Baton starts, runs and stops."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from deploy.fleet_types import FleetStatus, MemberState

THROTTLE_S = 2.0  # between two lines about one worker where lines cannot be overwritten


class Progress:
    """Writes progress to a stream: one line that changes on a terminal, few lines elsewhere.

    Args:
        out: usually standard error.
        result: receives the one line that says that Baton is ready.
        timeline: put the seconds since start before each line.
        started: time.monotonic() at start.
    """

    def __init__(
        self,
        out: TextIO = sys.stderr,
        result: TextIO = sys.stdout,
        timeline: bool = False,
        started: float | None = None,
    ) -> None:
        self._out = out
        self._result = result
        self._timeline = timeline
        self._started = time.monotonic() if started is None else started
        self._live = out.isatty() and not timeline
        self._shown: dict[str, tuple[str, float]] = {}
        self._num_events = 0
        self._open_line = False

    def say(self, text: str, detail: bool = False) -> None:
        """One line that stays; details are for those who asked for the timeline."""
        if detail and not self._timeline:
            return
        self._clear()
        stamp = f"[{time.monotonic() - self._started:6.2f} s] " if self._timeline else ""
        self._out.write(f"{stamp}{text}\n")
        self._out.flush()

    def ready(self, text: str) -> None:
        """The line everyone waits for."""
        self.say(text, detail=True)
        self._clear()
        self._out.flush()
        self._result.write(f"{text}\n")
        self._result.flush()

    def starting(self, status: FleetStatus) -> None:
        """How far the workers are."""
        self._num_events = status.num_events
        busy = {m.worker_id: m.progress or m.state.value for m in status.members if m.state is not MemberState.READY}
        if self._live:
            self._clear()
            if busy:
                line = " | ".join(f"{name}: {text}" for name, text in busy.items())
                self._out.write(line[:110])
                self._open_line = True
            self._out.flush()
            return
        now = time.monotonic()
        for name, text in busy.items():
            shown, at = self._shown.get(name, ("", 0.0))
            if text != shown and (_stage(text) != _stage(shown) or now - at > THROTTLE_S):
                self._shown[name] = (text, now)
                self.say(f"{name}: {text}")

    def running(self, status: FleetStatus) -> None:
        """What happened since the last look."""
        fresh = min(status.num_events - self._num_events, len(status.events))
        self._num_events = status.num_events
        for event in status.events[len(status.events) - fresh :]:
            self.say(event)

    def _clear(self) -> None:
        if self._open_line:
            self._out.write("\r\x1b[2K")
            self._open_line = False


def _stage(text: str) -> str:
    """The text without its figures."""
    return "".join(character for character in text if not character.isdigit())
