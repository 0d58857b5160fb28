"""The autoscaler's decisions over whole stories: a simulated fleet does what it says, and takes its time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import msgspec
import pytest

from deploy.autoscale_core import AutoscaleCore, Step
from deploy.config import AutoscaleConfig, AutoscaleMode, FleetConfig, ServeConfig
from deploy.fleet_types import FleetStatus, MemberState, MemberStatus
from engine_core.errors import ConfigError
from engine_core.types import Role
from router.config import GatewayConfig
from router.load_meter import LoadTotals
from router.load_window import LoadWindows
from router.pool_model import DecodeCosts
from tests.deploy.fakes import IDLE, worker_info

WINDOW_S = 10.0
SERVICE_S = 0.4  # of a prompt: one prefill worker reads 2.5 a second
COSTS = DecodeCosts(step_s=0.005, row_s=1e-4, token_s=1e-8, num_slots=64, kv_tokens=1_000_000)
ACT = AutoscaleConfig(
    mode=AutoscaleMode.ACT, window_s=WINDOW_S, start_s=20.0, budget=5, max_prefill=4, max_decode=4, node_timeout_s=60.0
)


@dataclass
class Story:
    """A fleet that does what the core says: workers need `start_steps` windows, or for ever without a node."""

    config: AutoscaleConfig = ACT
    nodes: dict[Role, int] = field(default_factory=lambda: {Role.PREFILL: 4, Role.DECODE: 4})
    start_steps: int = 2

    def __post_init__(self) -> None:
        gateway = GatewayConfig(slo_ttft_s=2.0, slo_itl_s=0.02, local_prefill_tokens=0)
        self.core = AutoscaleCore(self.config, ServeConfig(autoscale=self.config, gateway=gateway).planner())
        self.now = 1000.0
        self.arrived = self.first = self.in_time = 0
        self.wanted = {Role.PREFILL: 1, Role.DECODE: 1}
        self.members = [self.member(role, 0, MemberState.READY) for role in Role]
        self.age: dict[str, int] = {}
        self.steps: list[Step | None] = []
        self.ceilings: dict[str, int] = {}
        self.tell(0.0, None)

    @staticmethod
    def member(role: Role, number: int, state: MemberState, becomes: Role | None = None) -> MemberStatus:
        name = f"{role}-{number}"
        return MemberStatus(name, role, 1, state, "", 1, worker_info(name, 1, role), IDLE, becomes)

    def status(self) -> FleetStatus:
        wanted = {str(role): count for role, count in self.wanted.items()}
        return FleetStatus(1, True, None, False, wanted, tuple(self.members), (), 0, self.ceilings)

    def tell(self, rate: float, met: float | None, decode: DecodeCosts | None = COSTS) -> None:
        count = round(rate * WINDOW_S)
        self.arrived += count
        self.first += count
        self.in_time += round(count * (1.0 if met is None else met))
        totals = LoadTotals(
            at=self.now,
            arrived=self.arrived,
            refused=0,
            first_tokens=self.first,
            first_in_time=self.in_time,
            late=0,
            ended=self.first,
            itl_met=self.first,
            output_tokens=100 * self.first,
            attended_tokens=500.0 * 100 * self.first,
            transfer_s=0.0,
            service_s=(SERVICE_S,) * min(count, 20),
            decode=decode,
        )
        self.core.heard("gateway", totals, self.now)

    def window(self, rate: float, met: float | None = None) -> Step | None:
        """One window of this load; then the fleet does what it is told."""
        self.now += WINDOW_S
        self.tell(rate, met)
        step = self.core.step(self.status(), self.now, self.now)
        self.steps.append(step)
        if step is not None:
            for source, target in step.flips:
                victim = max(m.worker_id for m in self.members if m.role is source and m.state is MemberState.READY)
                self.wanted[source] -= 1
                self.replace(victim, state=MemberState.DRAINING, becomes=target)
            self.wanted.update(step.wanted)
        self.live()
        return step

    def replace(self, name: str, **changes: object) -> None:
        self.members = [msgspec.structs.replace(m, **changes) if m.worker_id == name else m for m in self.members]

    def live(self) -> None:
        """Drained ones go, nodes come, starts end; then the pools are made what they should be."""
        for member in [m for m in self.members if m.state is MemberState.DRAINING]:
            self.members.remove(member)
            if member.becomes is not None:
                self.wanted[member.becomes] += 1
        for role in Role:
            for member in [m for m in self.members if m.role is role]:
                self.advance(member)
            self.reconcile(role)

    def advance(self, member: MemberStatus) -> None:
        placed = sum(m.role is member.role and m.state is not MemberState.PENDING for m in self.members)
        if member.state is MemberState.PENDING and placed < self.nodes[member.role]:
            self.replace(member.worker_id, state=MemberState.STARTING)
        elif member.state is MemberState.STARTING:
            self.age[member.worker_id] = self.age.get(member.worker_id, 0) + 1
            if self.age[member.worker_id] >= self.start_steps:
                self.replace(member.worker_id, state=MemberState.READY)

    def reconcile(self, role: Role) -> None:
        staying = [m for m in self.members if m.role is role and m.state is not MemberState.DRAINING]
        for member in sorted(staying, key=lambda m: m.state is MemberState.PENDING)[self.wanted[role] :]:
            if member.state is MemberState.READY:
                self.replace(member.worker_id, state=MemberState.DRAINING)
            else:
                self.members.remove(member)
        taken = {m.worker_id for m in self.members}
        names = [name for name in (f"{role}-{number}" for number in range(20)) if name not in taken]
        for name in names[: max(0, self.wanted[role] - len(staying))]:
            self.age[name] = 0
            self.members.append(self.member(role, int(name.rpartition("-")[2]), MemberState.PENDING))

    def ready(self, role: Role) -> int:
        return sum(m.role is role and m.state is MemberState.READY for m in self.members)

    @property
    def decisions(self):
        return self.core.view().decisions


def test_a_load_step_gets_workers_and_its_end_gives_them_back() -> None:
    story = Story()
    for _ in range(8):
        story.window(1.0)
    assert story.ready(Role.PREFILL) == 1 and not story.decisions
    for _ in range(8):
        story.window(5.0)
    assert story.ready(Role.PREFILL) >= 3, "5/s of 0.4 s keep two busy"
    first = story.decisions[0]
    assert first.acted and first.before == {"prefill": 1, "decode": 1} and first.after["prefill"] > 1
    assert first.text.startswith("1P1D -> ") and any("the floor is" in reason for reason in first.reasons)
    for _ in range(60):
        story.window(0.5)
    assert story.ready(Role.PREFILL) == 1
    directions = {(change.role, change.direction, change.cause) for change in story.core.view().changes}
    assert {("prefill", "up", "forecast"), ("prefill", "down", "spare")} <= directions


def test_a_node_that_never_comes_is_given_up_and_its_budget_serves_the_other_pool() -> None:
    story = Story(nodes={Role.PREFILL: 1, Role.DECODE: 4})
    for _ in range(4):
        story.window(1.0)
    for _ in range(4):
        story.window(9.0, met=0.2)
    pending = [m for m in story.members if m.state is MemberState.PENDING]
    assert pending and all(m.role is Role.PREFILL for m in pending)
    for _ in range(4):
        story.window(9.0, met=0.2)
    given_up = [one for one in story.decisions if any("no node came for prefill-" in why for why in one.reasons)]
    assert given_up and given_up[0].after["prefill"] == 1
    assert not [m for m in story.members if m.state is MemberState.PENDING]
    held = len(story.decisions)
    for _ in range(4):
        story.window(9.0, met=0.2)
    assert len(story.decisions) == held, "nothing more is asked for while it is known not to be had"
    for _ in range(6):
        story.window(9.0, met=0.2)
    assert [m for m in story.members if m.state is MemberState.PENDING], "after a while it is tried again"
    for _ in range(6):
        story.window(9.0, met=0.2)
    assert any("given up for 120 s" in why for one in story.decisions for why in one.reasons)


def test_a_worker_below_the_minimum_is_waited_for() -> None:
    story = Story(nodes={Role.PREFILL: 0, Role.DECODE: 4})
    story.replace("prefill-0", state=MemberState.PENDING)
    for _ in range(20):
        story.window(1.0)
    assert [m.state for m in story.members if m.role is Role.PREFILL] == [MemberState.PENDING]
    assert not story.core._scarce, "it is not given up"


def test_a_flip_takes_its_worker_from_the_other_pool_first() -> None:
    config = dataclasses.replace(ACT, flip_s=5.0, budget=4)
    story = Story(config)
    story.wanted[Role.DECODE] = 3
    story.members += [story.member(Role.DECODE, number, MemberState.READY) for number in (1, 2)]
    for _ in range(3):
        story.window(1.0)
    while not any(step and step.flips for step in story.steps):
        assert len(story.steps) < 30
        story.window(4.5, met=0.3)
    step = next(step for step in story.steps if step and step.flips)
    assert set(step.flips) == {(Role.DECODE, Role.PREFILL)} and step.decision is not None
    from_nodes = step.decision.after["prefill"] - len(step.flips)
    assert step.wanted[Role.PREFILL] == from_nodes, "a flipped worker's place is not asked of another node, too"
    for _ in range(8):
        story.window(4.5)
        assert len(story.members) <= 4
    assert story.ready(Role.PREFILL) >= 2
    assert any(change.direction == "flip" for change in story.core.view().changes)


def test_no_pool_grows_into_a_slice_that_was_drained_by_hand() -> None:
    story = Story()
    for _ in range(4):
        story.window(1.0)
    story.ceilings = {"prefill": 1, "decode": 1}
    for _ in range(6):
        story.window(5.0, met=0.2)
    assert len(story.members) == 2 and not story.decisions
    assert story.core.view().ceilings == story.ceilings
    story.ceilings = {}
    for _ in range(6):
        story.window(5.0, met=0.2)
    assert story.ready(Role.PREFILL) >= 2 and story.core.view().ceilings == {}


def test_advice_is_given_once_and_nothing_is_done() -> None:
    story = Story(dataclasses.replace(ACT, mode=AutoscaleMode.ADVISE))
    for _ in range(4):
        story.window(1.0)
    steps = [story.window(5.0) for _ in range(6)]
    assert all(step is None or (step.flips, step.wanted) == ((), {}) for step in steps)
    told = story.decisions
    assert told and not any(one.acted for one in told)
    assert len({(tuple(one.before.items()), tuple(one.after.items())) for one in told}) == len(told)
    assert story.ready(Role.PREFILL) == 1


def test_it_waits_for_measurements() -> None:
    story = Story()
    assert story.core.step(story.status(), story.now, 0.0) is None
    assert story.core.view().waits_for == "no gateway has told its load yet"
    story.now += WINDOW_S
    story.tell(1.0, None, decode=None)
    core = AutoscaleCore(ACT, ServeConfig(autoscale=ACT).planner())
    story.core = core
    story.tell(1.0, None, decode=None)
    story.now += WINDOW_S
    story.tell(1.0, None, decode=None)
    assert core.step(story.status(), story.now, 0.0) is None
    assert core.view().waits_for == "too few decode steps have been measured yet"
    story.window(1.0)
    assert core.view().waits_for == "" and core.view().target


def totals(**changes: object) -> LoadTotals:
    zero = dict.fromkeys(LoadTotals.__struct_fields__, 0)
    return LoadTotals(**{**zero, "service_s": (), "decode": None, **changes})  # type: ignore[arg-type]


def test_windows_add_gateways_up_each_by_its_own_clock() -> None:
    windows = LoadWindows(10.0)
    windows.heard("a", totals(at=5.0, arrived=100), 0.0)
    windows.heard("b", totals(at=900.0), 0.0)
    assert windows.close(1.0) is None
    windows.heard("a", totals(at=13.0, arrived=108, first_tokens=6, first_in_time=3, service_s=(0.1,)), 8.0)
    windows.heard("a", totals(at=15.0, arrived=110, first_tokens=6, first_in_time=3, late=2, refused=2), 10.0)
    windows.heard("b", totals(at=920.0, arrived=10, ended=4, itl_met=3, output_tokens=40, attended_tokens=4e3), 10.0)
    window = windows.close(10.0)
    assert window is not None
    assert window.requests == pytest.approx(10 + 5)
    assert window.ttft_met == pytest.approx(3 / 10)
    assert (window.itl_met, window.output_tokens, window.context_tokens) == (0.75, 10.0, 100.0)
    assert window.service_s == [0.1]
    windows.heard("a", totals(at=25.0, arrived=110, first_tokens=6, first_in_time=3, refused=2), 20.0)
    window = windows.close(20.0)
    assert window is not None and window.requests == 0 and window.ttft_met is None and not window.service_s
    windows.heard("a", totals(at=80.0, arrived=110), 60.0)
    assert windows.close(60.0) is not None, "b has been silent for four windows; a has not"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"window_s": 0.0}, "autoscale.window_s"),
        ({"cooldown_s": 1.0}, "autoscale.cooldown_s"),
        ({"budget": 1}, "autoscale.budget"),
        ({"min_prefill": 0}, "autoscale.min_prefill"),
        ({"min_decode": 9}, "autoscale.min_decode"),
        ({"node_timeout_s": -1.0}, "autoscale.node_timeout_s"),
        ({"flip_s": -1.0}, "autoscale.flip_s"),
    ],
)
def test_configurations_that_cannot_be(fields: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}"):
        AutoscaleConfig(**fields)  # type: ignore[arg-type]


def test_the_fleet_has_to_be_within_the_bounds_unless_it_is_off() -> None:
    many = FleetConfig(prefill=5)
    assert ServeConfig(fleet=many).fleet.prefill == 5
    with pytest.raises(ConfigError, match=r"fleet\.prefill must be in autoscale's 1\.\.4, not 5"):
        ServeConfig(fleet=many, autoscale=ACT)
    with pytest.raises(ConfigError, match="needs prefill workers"):
        ServeConfig(fleet=FleetConfig(colocated=True), autoscale=ACT)
    with pytest.raises(ConfigError, match=r"autoscale\.budget, 5"):
        ServeConfig(fleet=FleetConfig(prefill=3, decode=3), autoscale=ACT)
