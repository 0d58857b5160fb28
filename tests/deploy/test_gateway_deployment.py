import asyncio
import contextlib
from collections.abc import Sequence

from deploy.config import FleetConfig
from deploy.fleet_core import FleetCore
from deploy.fleet_types import FleetStatus, Membership, WorkerLost
from deploy.gateway_deployment import ANY, first_members, follow_fleet, follow_status
from engine_core.messages import WorkerInfo
from engine_core.types import Role
from router.fleet_view import FleetView
from tests.deploy.fakes import FakeHandle, worker_info


class Fleet:
    def __init__(self, *answers: Membership | WorkerLost) -> None:
        self.answers = list(answers)
        self.asked: list[int] = []

    async def wait_for_change(self, version: int, timeout_s: float) -> Membership:
        self.asked.append(version)
        if not self.answers:
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, WorkerLost):
            raise answer
        return answer

    async def watch(self, version: int, timeout_s: float) -> FleetStatus:
        raise WorkerLost("gone")


class Recorder:
    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.fleets: list[FleetView] = []

    async def start(self, workers: Sequence[WorkerInfo] = ()) -> None: ...

    def follow(self, workers: Sequence[WorkerInfo]) -> None:
        self.seen.append([worker.worker_id for worker in workers])

    def describe_fleet(self, fleet: FleetView) -> None:
        self.fleets.append(fleet)

    def check_health(self) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...


async def test_a_new_gateway_asks_for_the_members_but_not_for_long() -> None:
    one = Membership(7, (worker_info("decode-0", 1, Role.DECODE),))
    fleet = Fleet(one, WorkerLost("there is none yet"))
    assert await first_members(fleet, 3) == one.workers
    assert fleet.asked == [ANY]
    assert await first_members(fleet, 3) == ()
    assert await first_members(fleet, 0.01) == (), "a fleet that is busy"


async def test_the_gateway_follows_changes_only_and_keeps_its_view_without_a_fleet() -> None:
    one = Membership(1, (worker_info("decode-0", 1, Role.DECODE),))
    none = Membership(2, ())
    fleet, gateway = Fleet(one, one, WorkerLost("gone"), none), Recorder()
    following = asyncio.create_task(follow_fleet(fleet, gateway, retry_s=0.01))
    async with asyncio.timeout(15):
        while len(fleet.asked) < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    assert gateway.seen == [["decode-0"], []]
    assert fleet.asked == [0, 1, 1, ANY, 2]


async def test_the_dashboard_hears_what_the_fleet_does() -> None:
    handles: list[FakeHandle] = []

    def launch(spec):
        handles.append(FakeHandle(spec))
        return handles[-1]

    fleet, gateway = FleetCore(FleetConfig(prefill=0, decode=1), launch), Recorder()
    await fleet.start()
    describing = asyncio.create_task(follow_status(fleet, gateway, retry_s=0.01))
    async with asyncio.timeout(15):
        while not handles or not gateway.fleets:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        handles[0].become_ready()
        while gateway.fleets[-1].members[0].state != "ready":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert gateway.fleets[-1].wanted == {"prefill": 0, "decode": 1}
    assert gateway.fleets[-1].events[-1] == "decode-0 (incarnation 1) is ready"
    describing.cancel()
    await fleet.stop(0.1)
