"""The fleet without Ray: which workers should live, which do, and what the gateways may know of them.

One asyncio task per worker leads it through its lives::

    (pending ->) starting -> ready -> draining -> gone      (asked to leave)
                    |          |
                    +----------+--> waiting -> starting     (died: the next life has incarnation + 1)

Workers are reached through `WorkerHandle`; `deploy.fleet` implements it over Ray actors, tests with plain objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable

from deploy.config import FleetConfig
from deploy.fleet_types import (
    FleetStatus,
    Membership,
    MemberState,
    MemberStatus,
    StartFailed,
    Successor,
    WorkerHandle,
    WorkerLost,
    WorkerReport,
    WorkerSpec,
)
from engine_core.errors import ConfigError
from engine_core.messages import Load, WorkerInfo
from engine_core.types import Role

logger = logging.getLogger(__name__)


MAX_EVENTS = 50
MAX_DOUBLINGS = 64  # of a pause: larger numbers are no floats in the end
DRAIN_GRACE_S = 2.0  # for a worker to notice by itself that its time is up
OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}


class Member:
    """The fleet's mutable knowledge of one worker."""

    def __init__(self, worker_id: str, role: Role, incarnation: int, place: int) -> None:
        self.worker_id = worker_id
        self.role = role
        self.incarnation = incarnation
        self.place = place
        self.state = MemberState.STARTING
        self.progress = ""
        self.pid: int | None = None
        self.info: WorkerInfo | None = None
        self.load: Load | None = None
        self.retire = asyncio.Event()
        self.becomes: Role | None = None  # a worker of this role takes its place when it is gone
        self.task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """For people and logs."""
        return f"{self.worker_id} (incarnation {self.incarnation})"

    def spec(self) -> WorkerSpec:
        """The life to start."""
        return WorkerSpec(self.worker_id, self.role, self.incarnation, self.place)

    def status(self) -> MemberStatus:
        """A snapshot."""
        return MemberStatus(
            worker_id=self.worker_id,
            role=self.role,
            incarnation=self.incarnation,
            state=self.state,
            progress=self.progress,
            pid=self.pid,
            info=self.info,
            load=self.load,
            becomes=self.becomes,
        )

    def worth(self) -> tuple[int, int, int]:
        """What would be lost if it left: of a pool's surplus, the least worth leaves first."""
        stage = (MemberState.PENDING, MemberState.WAITING, MemberState.STARTING, MemberState.READY).index(self.state)
        busy = self.load.running + self.load.waiting if self.load is not None else 0
        return stage, busy, -self.number

    @property
    def number(self) -> int:
        """The last part of its name."""
        return int(self.worker_id.rpartition("-")[2])


class FleetCore:
    """Keeps as many workers alive as were asked for.

    Args:
        config: counts, intervals and timeouts.
        launch: starts a process for a life and returns its handle at once.
    """

    def __init__(self, config: FleetConfig, launch: Callable[[WorkerSpec], WorkerHandle]) -> None:
        self._config = config
        self._launch = launch
        self._wanted = {role: config.count(role) for role in Role}
        self._ceilings: dict[Role, int] = {}
        self._members: dict[str, Member] = {}
        self._lives: dict[str, int] = {}  # last incarnation of every worker id ever used
        self._published: dict[str, WorkerInfo] = {}
        self._membership_version = 0
        self._status_version = 0
        self._fatal: Exception | None = None
        self._events: list[str] = []
        self._num_events = 0
        self._changed = asyncio.Condition()
        self._stopping = False
        self._was_ready = False  # once the fleet has served, nothing is fatal any more
        self._drain_timeout_s = config.drain_timeout_s

    # -- what callers ask ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start every wanted worker; returns at once."""
        self._reconcile()
        await self._notify()

    async def scale(self, wanted: dict[Role, int]) -> FleetStatus:
        """Change how many workers there should be; new ones start and surplus ones drain in the background.

        Who says so knows which slices may be used: the roles' ceilings are gone.
        """
        for role, count in wanted.items():
            if count < self._least(role):
                raise ConfigError(f"{role} must be at least {self._least(role)}, not {count}")
        for role in wanted:
            self._ceilings.pop(role, None)
        return await self.resize(wanted)

    async def resize(self, wanted: dict[Role, int]) -> FleetStatus:
        """As `scale`, for the autoscaler: what was drained by hand stays so."""
        self._wanted.update(wanted)
        self._reconcile()
        await self._notify()
        return self.status()

    async def flip(self, source: Role) -> None:
        """Let a worker of a role leave, and one of the other role take its place when it has drained."""
        staying = self._staying(source)
        if len(staying) > 1:
            await self._retire(min(staying, key=Member.worth), Successor.OTHER)

    async def drain(self, worker_id: str, successor: Successor) -> FleetStatus:
        """Let this worker leave in the background: it takes nothing new, and its streams move.

        Without a successor its slice stays free: from now on no pool shall grow by itself above what it is, since any
        new worker might land there, until `scale` says how large it shall be.

        Raises:
            ConfigError: there is no such worker, it is leaving already, or the fleet cannot do without it.
        """
        member = self._members.get(worker_id)
        if member is None:
            raise ConfigError(f"there is no worker {worker_id!r}, but {', '.join(sorted(self._members))}")
        if member.retire.is_set():
            raise ConfigError(f"{worker_id} is leaving already")
        if successor is Successor.OTHER:
            self._check_flip()
        if successor is not Successor.SAME:
            self._check_spare(member)
        await self._retire(member, successor)
        if successor is Successor.NONE:
            coming = Counter(other.becomes for other in self._members.values())
            now = {role: count + coming[role] for role, count in self._wanted.items()}
            self._ceilings = now | self._ceilings | {member.role: now[member.role]}
        return self.status()

    def _check_flip(self) -> None:
        if self._config.count(Role.PREFILL) == 0:
            raise ConfigError("this fleet has no prefill workers: its decode workers read the prompts themselves")
        if self._config.prefill_hosts not in (0, self._config.hosts_per_worker):
            raise ConfigError("prefill and decode workers span unlike numbers of machines: none can change its role")

    def _check_spare(self, member: Member) -> None:
        """Whether the others of its role do without it."""
        role = member.role
        others = [other for other in self._staying(role) if other is not member]
        serving = sum(other.state is MemberState.READY for other in others)
        if len(others) < self._least(role) or (member.state is MemberState.READY and self._least(role) > serving):
            only = f"{member.worker_id} is the only {role} worker that serves"
            raise ConfigError(f"{only}: scale up before, or let another one replace it")

    async def _retire(self, member: Member, successor: Successor) -> None:
        if successor is not Successor.SAME:
            self._wanted[member.role] -= 1
        if successor is Successor.OTHER:
            member.becomes = OTHER[member.role]
        member.retire.set()
        after = {
            Successor.NONE: "",
            Successor.SAME: "; its next life follows",
            Successor.OTHER: f"; a {OTHER[member.role]} worker takes its place",
        }
        await self._log_event(f"{member.name} shall leave{after[successor]}")

    async def tell(self, text: str) -> None:
        """Enter something into the events."""
        await self._log_event(text)

    async def stop(self, drain_timeout_s: float) -> None:
        """Drain and end every worker."""
        self._stopping = True
        self._drain_timeout_s = drain_timeout_s
        tasks = [member.task for member in self._members.values() if member.task is not None]
        for member in self._members.values():
            member.retire.set()
        await asyncio.gather(*tasks)

    async def wait_for_change(self, version: int, timeout_s: float) -> Membership:
        """The membership as soon as its version differs from `version`, or after `timeout_s`."""
        await self._wait(lambda: self._membership_version != version, timeout_s)
        return Membership(self._membership_version, tuple(self._published.values()))

    async def watch(self, version: int, timeout_s: float) -> FleetStatus:
        """The status as soon as its version differs from `version`, or after `timeout_s`."""
        await self._wait(lambda: self._status_version != version, timeout_s)
        return self.status()

    def status(self) -> FleetStatus:
        """A snapshot for people."""
        order = {Role.PREFILL: 0, Role.DECODE: 1}
        members = sorted(self._members.values(), key=lambda member: (order[member.role], member.place))
        return FleetStatus(
            version=self._status_version,
            ready=self._is_ready(),
            fatal=None if self._fatal is None else str(self._fatal),
            fatal_is_config=isinstance(self._fatal, ConfigError),
            wanted={role.value: count for role, count in self._wanted.items()},
            members=tuple(member.status() for member in members),
            events=tuple(self._events),
            num_events=self._num_events,
            ceilings={role.value: count for role, count in self._ceilings.items()},
        )

    # -- wanted against living ----------------------------------------------------------------------------------

    def _is_ready(self) -> bool:
        """Whether every wanted worker serves."""
        ready = [m.role for m in self._members.values() if m.state is MemberState.READY]
        return self._fatal is None and all(ready.count(role) >= count for role, count in self._wanted.items())

    def _reconcile(self) -> None:
        """Start what is missing and retire the surplus, those that are worth least first."""
        if self._stopping:
            return
        for role, count in self._wanted.items():
            staying = sorted(self._staying(role), key=Member.worth)
            for member in staying[: max(0, len(staying) - count)]:
                member.retire.set()
            used = {member.number for member in self._staying(role)}
            free = itertools.filterfalse(used.__contains__, itertools.count())
            for number in itertools.islice(free, count - len(used)):
                name = f"{role}-{number}"
                if name not in self._members:  # one that still drains comes back when it is gone
                    self._add(name, role)

    def _least(self, role: Role) -> int:
        """Workers of a role without which nothing goes."""
        return 0 if role is Role.PREFILL and self._config.count(role) == 0 else 1

    def _staying(self, role: Role) -> list[Member]:
        """Those of a role that were not told to leave."""
        return [member for member in self._members.values() if member.role is role and not member.retire.is_set()]

    def _add(self, worker_id: str, role: Role) -> None:
        used = {member.place for member in self._members.values()}
        place = next(place for place in range(len(used) + 1) if place not in used)
        member = Member(worker_id, role, self._next_incarnation(worker_id), place)
        self._members[worker_id] = member
        member.task = asyncio.create_task(self._lead(member), name=f"lead {worker_id}")

    def _next_incarnation(self, worker_id: str) -> int:
        self._lives[worker_id] = self._lives.get(worker_id, 0) + 1
        return self._lives[worker_id]

    # -- one worker's lives -------------------------------------------------------------------------------------

    async def _lead(self, member: Member) -> None:
        """Lead a worker from its first life to its retirement."""
        deaths = 0
        while not member.retire.is_set() and self._fatal is None:
            was_ready = await self._live_once(member)
            if member.retire.is_set() or self._fatal is not None:
                break
            deaths = 1 if was_ready else deaths + 1
            if not self._was_ready and deaths >= self._config.start_attempts:
                await self._fail(WorkerLost(f"{member.worker_id} died {deaths} times while it started"))
                break
            await self._enter(member, MemberState.WAITING)
            pause_s = min(self._config.backoff_s * 2 ** min(deaths - 1, MAX_DOUBLINGS), self._config.max_backoff_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(member.retire.wait(), pause_s)
            member.incarnation = self._next_incarnation(member.worker_id)
        del self._members[member.worker_id]
        if member.becomes is not None:
            self._wanted[member.becomes] += 1
        self._reconcile()
        await self._notify()

    async def _live_once(self, member: Member) -> bool:
        """One life, from launch to death or retirement; returns whether it was ever ready."""
        await self._enter(member, MemberState.STARTING)
        handle = self._launch(member.spec())
        try:
            info = await self._until_ready(member, handle) if await self._until_placed(member, handle) else None
            if info is None:
                return False
            member.info = info
            await self._publish(member, info)
            await self._enter(member, MemberState.READY)
            await self._until_death_or_retirement(member, handle)
            await self._withdraw(member)  # gateways give it nothing new, and wait for what it has
            await self._enter(member, MemberState.DRAINING)
            with contextlib.suppress(WorkerLost, TimeoutError):
                await asyncio.wait_for(handle.drain(self._drain_timeout_s), self._drain_timeout_s + DRAIN_GRACE_S)
        except WorkerLost as error:
            await self._log_event(f"{member.name} died: {error}")
        finally:
            ready = member.info is not None
            await self._withdraw(member)
            await handle.kill()
            member.info = member.pid = member.load = None
            member.progress = ""
        return ready

    async def _until_placed(self, member: Member, handle: WorkerHandle) -> bool:
        """Wait until a node has room for the worker; False when it was told to leave before that."""
        placing = asyncio.create_task(handle.place())
        retire = asyncio.create_task(member.retire.wait())
        both = {placing, retire}
        try:
            soon = self._config.health_interval_s
            await asyncio.wait(both, timeout=soon, return_when=asyncio.FIRST_COMPLETED)
            if not placing.done() and not retire.done():
                await self._enter(member, MemberState.PENDING)
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if placing.done():
                    await self._enter(member, MemberState.STARTING)
            if placing.done():
                placing.result()
            return placing.done()
        finally:
            for task in both:
                task.cancel()
            await asyncio.wait(both)

    async def _until_ready(self, member: Member, handle: WorkerHandle) -> WorkerInfo | None:
        """Await start-up while relaying progress; None when it was told to leave or can never start."""
        starting = asyncio.create_task(handle.start())
        retire = asyncio.create_task(member.retire.wait())
        try:
            while True:
                await asyncio.wait(
                    {starting, retire}, timeout=self._config.health_interval_s, return_when=asyncio.FIRST_COMPLETED
                )
                if starting.done():
                    return starting.result()
                if retire.done():
                    return None
                with contextlib.suppress(TimeoutError):  # compiling may hold the worker's loop for a while
                    report = await asyncio.wait_for(handle.report(), self._config.health_timeout_s)
                    await self._note(member, report)
        except (ConfigError, StartFailed) as error:
            if self._was_ready:
                raise WorkerLost(str(error)) from error
            await self._fail(error)
            return None
        finally:
            retire.cancel()
            if not starting.done():
                starting.cancel()
            await asyncio.wait({starting, retire})
            if not starting.cancelled():
                starting.exception()  # retrieved, so that asyncio does not complain

    async def _until_death_or_retirement(self, member: Member, handle: WorkerHandle) -> None:
        """Return when the worker was told to leave; raise WorkerLost when it is dead, sick or silent."""
        while not member.retire.is_set():
            try:
                report = await asyncio.wait_for(handle.report(), self._config.health_timeout_s)
            except TimeoutError:
                raise WorkerLost(f"no answer for {self._config.health_timeout_s:g} s") from None
            if not report.healthy:
                raise WorkerLost("its engine stopped")
            await self._note(member, report)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(member.retire.wait(), self._config.health_interval_s)

    # -- telling others -----------------------------------------------------------------------------------------

    async def _note(self, member: Member, report: WorkerReport) -> None:
        member.load = report.load
        if (member.progress, member.pid) != (report.progress, report.pid):
            member.progress, member.pid = report.progress, report.pid
            await self._notify()

    async def _enter(self, member: Member, state: MemberState) -> None:
        member.state = state
        if state is MemberState.READY:
            member.progress = ""
            self._was_ready = self._was_ready or self._is_ready()
        if state is MemberState.WAITING:  # its death was told
            await self._notify()
        else:
            await self._log_event(f"{member.name} is {state}")

    async def _fail(self, error: Exception) -> None:
        """Record why the fleet can never be ready."""
        self._fatal = self._fatal or error
        await self._log_event(f"cannot start: {error}")

    async def _log_event(self, text: str) -> None:
        logger.info("%s", text)
        self._events = [*self._events[1 - MAX_EVENTS :], text]
        self._num_events += 1
        await self._notify()

    async def _publish(self, member: Member, info: WorkerInfo) -> None:
        self._published[member.worker_id] = info
        self._membership_version += 1
        await self._notify()

    async def _withdraw(self, member: Member) -> None:
        if self._published.pop(member.worker_id, None) is not None:
            self._membership_version += 1
            await self._notify()

    async def _notify(self) -> None:
        self._status_version += 1
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(condition), timeout_s)
