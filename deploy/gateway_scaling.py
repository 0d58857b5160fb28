"""How many gateways there should be: Ray Serve asks this policy, and starts and drains the replicas."""

from __future__ import annotations

import math
from typing import Any, Protocol

STREAMS = "streams"  # the metric that every replica tells
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 10.0, 300.0  # streams last long: a gateway that drains gives nothing back soon
LOOK_BACK_S = 20.0


class ScalingContext(Protocol):
    """The part of Serve's `AutoscalingContext` that is used."""

    current_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int

    @property
    def aggregated_metrics(self) -> dict[str, dict[Any, float]]:
        """Metric -> replica -> mean over the last `LOOK_BACK_S`."""


class StreamsPolicy:
    """As many gateways as keep the choices in progress at each of them below a number.

    Args:
        streams_per_gateway: choices in progress that one gateway shall carry.
    """

    def __init__(self, streams_per_gateway: int) -> None:
        self._each = streams_per_gateway

    def __call__(self, context: ScalingContext) -> tuple[int, dict[str, Any]]:
        """(replicas, state to keep: none)."""
        told = context.aggregated_metrics.get(STREAMS, {})
        if not told:
            return context.current_num_replicas, {}
        wanted = math.ceil(sum(told.values()) / self._each)
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, least), most), {}
