"""The policy alone; Serve asks it in test_serve."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from deploy.config import FleetConfig
from deploy.gateway_scaling import STREAMS, StreamsPolicy
from engine_core.errors import ConfigError


@dataclass
class Context:
    told: list[float]
    current_num_replicas: int = 2
    capacity_adjusted_min_replicas: int = 1
    capacity_adjusted_max_replicas: int = 4
    aggregated_metrics: dict[str, dict[int, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.aggregated_metrics = {STREAMS: dict(enumerate(self.told))} if self.told else {}


@pytest.mark.parametrize(
    ("told", "wanted"), [([], 2), ([0.0, 0.0], 1), ([100.0, 99.0], 2), ([100.0, 101.0], 3), ([900.0], 4)]
)
def test_as_many_as_the_streams_want_within_bounds(told: list[float], wanted: int) -> None:
    assert StreamsPolicy(streams_per_gateway=100)(Context(told)) == (wanted, {})


def test_bounds_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"fleet\.max_gateways must be 0 or at least fleet\.gateways, not 1"):
        FleetConfig(gateways=2, max_gateways=1)
    with pytest.raises(ConfigError, match=r"fleet\.streams_per_gateway"):
        FleetConfig(streams_per_gateway=0)
