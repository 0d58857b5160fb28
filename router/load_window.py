"""The load of all gateways over one window, from the totals that each of them tells."""

from __future__ import annotations

from dataclasses import dataclass

from router.load_meter import LoadTotals
from router.pool_model import DecodeCosts

STALE_WINDOWS = 3.0  # a gateway that was silent for longer is gone


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadWindow:
    """See `planner.Observation`, whose fields of the same names these become."""

    requests: float
    service_s: list[float]
    output_tokens: float
    context_tokens: float
    ttft_met: float | None
    itl_met: float | None
    transfer_s: float
    decode: DecodeCosts | None


@dataclass(slots=True)
class _Source:
    """One gateway: what it said when the last window closed, and last."""

    base: LoadTotals
    latest: LoadTotals
    heard_at: float
    service_s: list[float]


class LoadWindows:
    """Takes totals as they come and closes a window whenever it is asked to.

    Args:
        window_s: length of a window.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._sources: dict[str, _Source] = {}

    def heard(self, gateway: str, totals: LoadTotals, now: float) -> None:
        """A gateway told its totals. What it counted before it was heard first belongs to no window."""
        source = self._sources.get(gateway)
        if source is None:
            self._sources[gateway] = _Source(totals, totals, now, [])
            return
        source.latest, source.heard_at = totals, now
        source.service_s += totals.service_s

    def close(self, now: float) -> LoadWindow | None:
        """The load since the last call; None where no gateway told anything."""
        for name, source in list(self._sources.items()):
            if now - source.heard_at > STALE_WINDOWS * self._window_s:
                del self._sources[name]
        told = [source for source in self._sources.values() if source.latest.at > source.base.at]
        if not told:
            return None
        pairs = [(source.base, source.latest) for source in told]
        arrived = sum(latest.arrived - base.arrived for base, latest in pairs)
        first = sum(latest.first_tokens - base.first_tokens for base, latest in pairs)
        in_time = sum(latest.first_in_time - base.first_in_time for base, latest in pairs)
        never = sum(latest.late + latest.refused - base.refused for base, latest in pairs)
        ended = sum(latest.ended - base.ended for base, latest in pairs)
        itl_met = sum(latest.itl_met - base.itl_met for base, latest in pairs)
        output = sum(latest.output_tokens - base.output_tokens for base, latest in pairs)
        attended = sum(latest.attended_tokens - base.attended_tokens for base, latest in pairs)
        transfer_s = sum(latest.transfer_s - base.transfer_s for base, latest in pairs)
        window = LoadWindow(
            requests=sum((new.arrived - old.arrived) / (new.at - old.at) for old, new in pairs) * self._window_s,
            service_s=[seconds for source in told for seconds in source.service_s],
            output_tokens=output / ended if ended else 0.0,
            context_tokens=attended / output if output else 0.0,
            ttft_met=in_time / (first + never) if first + never else None,
            itl_met=itl_met / ended if ended else None,
            transfer_s=transfer_s / arrived if arrived else 0.0,
            decode=next((latest.decode for _, latest in pairs if latest.decode is not None), None),
        )
        for source in told:
            source.base, source.service_s = source.latest, []
        return window
