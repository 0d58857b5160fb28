"""The autoscaler without Ray and without a clock: what gateways measured and the fleet's state in, what to do out.

`router.planner` decides how many workers there should be. Here its view is put together, its plan is turned into what
the fleet understands, and what the planner cannot know is handled: a worker for which no node comes is given up, and
its role gets no more for a while, so that the rest of the budget serves the other role.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from deploy.config import AutoscaleConfig, AutoscaleMode
from deploy.fleet_types import FleetStatus, MemberState, MemberStatus
from engine_core.types import Role
from router.fleet_view import AutoscaleView, ScaleChange, ScaleDecision
from router.load_meter import LoadTotals
from router.load_window import LoadWindow, LoadWindows
from router.planner import Observation, Plan, Planner, PlannerConfig, SliceSample
from router.pool_model import DecodeCosts

MAX_DECISIONS = 20
MAX_PAUSES = 8  # times node_timeout_s
_NOBODY = "no gateway has told its load yet"
_UNMEASURED = "too few decode steps have been measured yet"


@dataclass(frozen=True, slots=True)
class Step:
    """What the fleet shall do now.

    Attributes:
        flips: (from, to), one worker each; to be done first.
        wanted: workers by role, without those that flips in progress will add.
        decision: what is new about it; None where nothing is.
    """

    flips: tuple[tuple[Role, Role], ...]
    wanted: dict[Role, int]
    decision: ScaleDecision | None


@dataclass(frozen=True, slots=True)
class _Scarcity:
    """A role for which no node came: `placed` workers had one then, and no more are asked for until then."""

    until: float
    pause_s: float
    placed: int


class AutoscaleCore:
    """See the module. `now` is any clock that never goes back, in seconds.

    Args:
        planner_config: its window is how often `step` shall be called.
    """

    def __init__(self, config: AutoscaleConfig, planner_config: PlannerConfig) -> None:
        self._config = config
        self._planner_config = planner_config
        self._planner = Planner(planner_config)
        self._windows = LoadWindows(planner_config.window_s)
        self._since: dict[tuple[str, int, MemberState], float] = {}  # when a life was first seen in a state
        self._scarce: dict[Role, _Scarcity] = {}
        self._decode_costs: DecodeCosts | None = None
        self._waits_for = _NOBODY
        self._target: dict[Role, int] = {}
        self._ceilings: dict[str, int] = {}
        self._changes: Counter[tuple[Role, str, str]] = Counter()
        self._decisions: deque[ScaleDecision] = deque(maxlen=MAX_DECISIONS)

    def heard(self, gateway: str, totals: LoadTotals, now: float) -> None:
        """A gateway told its totals."""
        self._windows.heard(gateway, totals, now)

    def view(self) -> AutoscaleView:
        """For people."""
        return AutoscaleView(
            mode=str(self._config.mode),
            waits_for=self._waits_for,
            target={str(role): count for role, count in self._target.items()},
            changes=tuple(
                ScaleChange(str(role), direction, cause, count)
                for (role, direction, cause), count in self._changes.items()
            ),
            decisions=tuple(self._decisions),
            ceilings=self._ceilings,
        )

    def step(self, fleet: FleetStatus, now: float, wall_s: float) -> Step | None:
        """Close a window; None where nothing can be said or done.

        Args:
            wall_s: seconds since 1970, for people.
        """
        self._note_states(fleet, now)
        self._ceilings = fleet.ceilings if self._config.mode is AutoscaleMode.ACT else {}
        window = self._windows.close(now)
        self._decode_costs = (window and window.decode) or self._decode_costs
        if window is None or self._decode_costs is None:
            self._waits_for = _UNMEASURED if window is not None else _NOBODY
            return None
        self._waits_for = ""
        lost = self._give_up(fleet, now)
        seen = self._observe(fleet, window, self._decode_costs, now)
        plan = self._planner.plan(seen)
        have = {role: _serving(seen, role) + seen.starting[role] for role in Role}
        self._target = {role: plan.wanted(role) for role in Role}
        if self._target == have:
            return None
        decision = self._decide(plan, have, lost, wall_s)
        if self._config.mode is not AutoscaleMode.ACT:
            return Step((), {}, decision)
        flipping = Counter(target for _, target in plan.flips)
        flipping.update(member.becomes for member in fleet.members if member.becomes is not None)
        wanted = {role: max(plan.wanted(role) - flipping[role], self._least(role)) for role in Role}
        return Step(plan.flips, wanted, decision)

    # seeing

    def _observe(self, fleet: FleetStatus, window: LoadWindow, decode: DecodeCosts, now: float) -> Observation:
        starting = Counter(dict.fromkeys(Role, 0))
        for member in fleet.members:
            if member.state in (MemberState.PENDING, MemberState.STARTING, MemberState.WAITING):
                starting[member.role] += 1
            elif member.becomes is not None:
                starting[member.becomes] += 1
        return Observation(
            at=now,
            requests=window.requests,
            service_s=window.service_s,
            output_tokens=window.output_tokens,
            context_tokens=window.context_tokens,
            ttft_met=window.ttft_met,
            itl_met=window.itl_met,
            slices=[self._sample(member, now) for member in fleet.members if member.state is MemberState.READY],
            starting=dict(starting),
            transfer_s=window.transfer_s,
            decode=decode,
            available=self._available(fleet, now),
        )

    def _available(self, fleet: FleetStatus, now: float) -> dict[Role, int]:
        """The most of a role: no node came for more, or a slice was drained by hand."""
        found = {Role(role): max(count, self._least(Role(role))) for role, count in self._ceilings.items()}
        for role, scarcity in self._scarce.items():
            if now < scarcity.until:
                placed = max(_placed(fleet, role), self._least(role))
                found[role] = min(found.get(role, placed), placed)
        return found

    def _sample(self, member: MemberStatus, now: float) -> SliceSample:
        pages = member.info.num_pages if member.info is not None else 0
        used = 1 - member.load.free_pages / pages if member.load is not None and pages else 0.0
        since = self._since.get((member.worker_id, member.incarnation, member.state), now)
        return SliceSample(role=member.role, age_s=now - since, kv_share=used)

    def _note_states(self, fleet: FleetStatus, now: float) -> None:
        lives = [(member.worker_id, member.incarnation, member.state) for member in fleet.members]
        self._since = {life: self._since.get(life, now) for life in lives}

    # nodes that do not come

    def _give_up(self, fleet: FleetStatus, now: float) -> list[str]:
        """Mark the roles whose workers have waited too long; what to say about it.

        As long as none comes, each time for twice as long as the time before: to ask again may cost the other role one.
        """
        said = []
        limit_s = self._config.node_timeout_s
        self._scarce = {role: one for role, one in self._scarce.items() if _placed(fleet, role) <= one.placed}
        for member in fleet.members:
            key = (member.worker_id, member.incarnation, member.state)
            late = member.state is MemberState.PENDING and now - self._since[key] >= limit_s
            if late and fleet.wanted[member.role] > self._least(member.role):
                last = self._scarce.get(member.role)
                if last is not None and now < last.until:
                    continue
                pause_s = limit_s if last is None else min(2 * last.pause_s, MAX_PAUSES * limit_s)
                self._scarce[member.role] = _Scarcity(now + pause_s, pause_s, _placed(fleet, member.role))
                text = f"no node came for {member.worker_id} within {limit_s:g} s: given up for {pause_s:g} s"
                said.append(f"{member.role}: {text}")
        return said

    def _least(self, role: Role) -> int:
        return self._config.min_prefill if role is Role.PREFILL else self._config.min_decode

    # deciding

    def _decide(self, plan: Plan, have: dict[Role, int], lost: list[str], wall_s: float) -> ScaleDecision | None:
        """What is new; None where it is the advice given last."""
        before = {str(role): count for role, count in have.items()}
        after = {str(role): plan.wanted(role) for role in Role}
        last = self._decisions[-1] if self._decisions else None
        acts = self._config.mode is AutoscaleMode.ACT
        if not acts and last is not None and (last.before, last.after) == (before, after):
            return None
        text, *reasons = plan.advise(have[Role.PREFILL], have[Role.DECODE]).splitlines()
        decision = ScaleDecision(
            at=wall_s,
            acted=acts,
            before=before,
            after=after,
            text=text,
            reasons=(*lost, *(reason.strip() for reason in reasons)),
        )
        self._decisions.append(decision)
        flipped = {target for _, target in plan.flips}
        for role, cause in plan.causes.items():
            direction = "flip" if role in flipped else "up" if plan.wanted(role) > have[role] else "down"
            self._changes[role, direction, str(cause)] += 1
        return decision


def _serving(seen: Observation, role: Role) -> int:
    return sum(sample.role is role for sample in seen.slices)


def _placed(fleet: FleetStatus, role: Role) -> int:
    """Workers of a role that have a node, or are about to."""
    here = (MemberState.STARTING, MemberState.READY, MemberState.WAITING)
    return sum(member.role is role and member.state in here for member in fleet.members)
