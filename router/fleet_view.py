"""What the fleet tells a gateway for people to read; placement never looks at it."""

from __future__ import annotations

import msgspec


class MemberView(msgspec.Struct, frozen=True):
    """One worker as the fleet sees it: also those that start, drain, or wait for their next life."""

    worker_id: str
    role: str
    incarnation: int
    state: str
    progress: str
    pid: int | None


class FleetView(msgspec.Struct, frozen=True):
    """The fleet. `events` are recent, oldest first; `wanted` is by role."""

    wanted: dict[str, int]
    members: tuple[MemberView, ...]
    events: tuple[str, ...]
