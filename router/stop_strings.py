"""Find stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through until a stop string is complete; holds back what may be the start of one.

    Of several matches the one that ends first wins (of those the longest), so the answer does not depend on how the
    text was cut into pieces.
    """

    __slots__ = ("_held", "_stops", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """Take more text; return what is certainly part of the answer. Nothing follows once `stopped`."""
        if self.stopped:
            return ""
        text = self._held + text
        best: tuple[int, int] | None = None  # end, start
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                best = min(best, (start + len(stop), start)) if best else (start + len(stop), start)
        if best:
            self.stopped = True
            self._held = ""
            return text[: best[1]]
        hold = self._overlap(text)
        if not hold:
            self._held = ""
            return text
        self._held = text[-hold:]
        return text[:-hold]

    def flush(self) -> str:
        """Return what was held back: no more text comes."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
