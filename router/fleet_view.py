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


class ScaleDecision(msgspec.Struct, frozen=True):
    """Something that the autoscaler decided.

    Attributes:
        at: seconds since 1970.
        acted: whether it was done; in the mode `advise` it was only said.
        before, after: workers by role.
        text: what to do, in one line.
        reasons: what was found, a sentence each.
    """

    at: float
    acted: bool
    before: dict[str, int]
    after: dict[str, int]
    text: str
    reasons: tuple[str, ...]


class ScaleChange(msgspec.Struct, frozen=True):
    """How often a pool was changed so, since the fleet's start.

    Attributes:
        direction: up, down, or flip (to this role).
        cause: see `planner.Cause`.
    """

    role: str
    direction: str
    cause: str
    count: int


class AutoscaleView(msgspec.Struct, frozen=True):
    """The autoscaler.

    Attributes:
        mode: off, advise or act.
        waits_for: why it decides nothing at present; empty where it does.
        target: workers that it wants, by role; empty before its first look.
        decisions: the latest, oldest first.
        ceilings: the most that it may ask for, by role, since a slice was drained by hand.
    """

    mode: str
    waits_for: str
    target: dict[str, int]
    changes: tuple[ScaleChange, ...]
    decisions: tuple[ScaleDecision, ...]
    ceilings: dict[str, int] = {}


class FleetView(msgspec.Struct, frozen=True):
    """The fleet. `events` are recent, oldest first; `wanted` is by role."""

    wanted: dict[str, int]
    members: tuple[MemberView, ...]
    events: tuple[str, ...]
    autoscale: AutoscaleView | None = None
