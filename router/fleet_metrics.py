"""What the fleet said of itself, as Prometheus families."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import Metric

from router.fleet_view import FleetView
from router.worker_metrics import simple_family

STATES = ("pending", "starting", "ready", "draining", "waiting")


def fleet_families(fleet: FleetView) -> Iterator[Metric]:
    """Pools by role and state, and what the autoscaler wants and did."""
    wanted, members = simple_family("baton_fleet_wanted_workers"), simple_family("baton_fleet_workers")
    counts = Counter((member.role, member.state) for member in fleet.members)
    for role, count in fleet.wanted.items():
        wanted.add_metric([role], count)
        for state in STATES:
            members.add_metric([role, state], counts[role, state])
    yield from (wanted, members)
    if fleet.autoscale is not None:
        target, changes = simple_family("baton_autoscale_target_workers"), simple_family("baton_autoscale_changes")
        for role, count in fleet.autoscale.target.items():
            target.add_metric([role], count)
        for change in fleet.autoscale.changes:
            changes.add_metric([change.role, change.direction, change.cause], change.count)
        yield from (target, changes)
