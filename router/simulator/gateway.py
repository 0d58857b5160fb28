"""The gateway of the simulated cluster: the router's real index, feeds, learned costs, admission queue and policy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from engine_core.errors import Overloaded
from engine_core.types import Request, Role, Tier
from router.admission import AdmissionQueue, Entry
from router.block_feed import BlockFeed
from router.block_index import BlockIndex
from router.candidate import Candidate
from router.cost_model import StepModel, TransferModel, fade
from router.placement import PlacementConfig
from router.simulator.job import Job
from router.simulator.policies import Placed, make_policy
from router.simulator.worker import Worker

BEAT_S = 0.25
MEASURED_S = 1.0
MAX_WAITING = 65536
_INDEX_BLOCKS = 65536

WorkerKey = tuple[str, int]


class Member:
    """A worker as this gateway knows it."""

    __slots__ = ("beat", "candidate", "feed", "measured_at", "worker")

    def __init__(self, worker: Worker, candidate: Candidate, feed: BlockFeed) -> None:
        self.worker = worker
        self.candidate = candidate
        self.feed = feed
        self.measured_at = 0.0
        self.beat: object = None


class Gateway:
    """Admits requests and places them.

    Args:
        policy: one of `policies.POLICIES`.
        config: of joint placement.
        lose_event: whether a message of block events is lost on its way.
        place: called for each request whose turn has come.
        refuse: called for each that will not be served.
    """

    def __init__(
        self,
        policy: str,
        config: PlacementConfig,
        seed: int,
        *,
        lose_event: Callable[[], bool],
        place: Callable[[Job], None],
        refuse: Callable[[Job], None],
    ) -> None:
        self.index = BlockIndex(_INDEX_BLOCKS, None)
        self.transfers = TransferModel()
        self.policy = make_policy(policy, self.index, self.transfers, config, seed)
        self.members: dict[WorkerKey, Member] = {}
        self._teachers: dict[Role, StepModel] = {}
        self._lose_event = lose_event
        self._place = place
        self._refuse = refuse
        self._queue = AdmissionQueue(MAX_WAITING, {})
        self._waiting: dict[Entry, Job] = {}

    def join(self, worker: Worker, now: float) -> None:
        """A worker introduced itself."""
        info = worker.info
        candidate = Candidate(info, StepModel(self._teachers.get(info.role)))
        candidate.connected = candidate.usable = True
        member = Member(worker, candidate, BlockFeed(self.index, (info.worker_id, info.incarnation)))
        self._teachers.setdefault(info.role, candidate.steps)
        self.members[candidate.key] = member
        self._snapshot(member, member.feed.connected(now).number, now)

    def leave(self, worker: Worker) -> None:
        """A worker is gone."""
        member = self.members.pop((worker.info.worker_id, worker.info.incarnation))
        member.candidate.connected = member.candidate.usable = False
        member.feed.close()
        self.transfers.forget(member.candidate.key)

    def admit(self, job: Job, deadline: float, now: float) -> None:
        """Place a request now, or when its turn has come; or refuse it."""
        if not self._waiting and self._has_room(now):
            self._queue.passed(now)
            self._place(job)
            return
        entry = Entry("", 0, float(job.num_prompt), deadline)
        try:
            self._queue.offer(entry, now)
        except Overloaded:
            self._refuse(job)
        else:
            self._waiting[entry] = job

    def on_room(self, now: float) -> None:
        """Place those that wait, as long as there is room."""
        while self._waiting and self._has_room(now):
            entry = self._queue.take(now)
            if entry is None:
                return
            self._place(self._waiting.pop(entry))

    def _has_room(self, now: float) -> bool:
        return self.policy.has_room(self.of(Role.PREFILL), self.of(Role.DECODE), now)

    def place(self, request: Request, hashes: Sequence[bytes], now: float, avoid: Collection[WorkerKey]) -> Placed:
        """Choose and reserve. Raises NoWorkerAvailable."""
        return self.policy.place(request, hashes, self.of(Role.PREFILL), self.of(Role.DECODE), now, avoid)

    def of(self, role: Role) -> list[Candidate]:
        """Workers of a role."""
        return [m.candidate for m in self.members.values() if m.candidate.info.role is role]

    def hear(self, now: float) -> None:
        """All beats that are due: loads, block events, samples; and the index's own upkeep."""
        for member in self.members.values():
            worker, candidate = member.worker, member.candidate
            candidate.usable = not worker.draining
            load = worker.load()
            if load != member.beat:
                member.beat = load
                candidate.told(load, now)
            events = worker.block_events()
            if events is not None and not self._lose_event():
                member.feed.on_events(events, now)
            if now - member.measured_at >= MEASURED_S:
                member.measured_at = now
                if samples := worker.samples():
                    candidate.steps.learn(samples, now)
            asked = member.feed.tick(now)
            if asked is not None:
                self._snapshot(member, asked.number, now)
        self.transfers.fit(now)
        for role in Role:
            fade([candidate.steps for candidate in self.of(role)], now)
        self.index.tick(now)
        for entry in self._queue.expire(now):
            self._refuse(self._waiting.pop(entry))
        self.on_room(now)

    def _snapshot(self, member: Member, number: int, now: float) -> None:
        lost = member.worker.block_events()  # what is not published yet is part of the snapshot
        if lost is not None:
            member.feed.on_events(lost, now)
        hashes = {Tier.DEVICE: member.worker.memory.cache.hashes()}
        for part in member.worker.publisher.snapshot(number, hashes):
            member.feed.on_snapshot(part, now)
