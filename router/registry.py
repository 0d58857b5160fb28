"""Which workers there are, and how busy each is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from engine_core.errors import BatonError, WorkerDied, WorkerSilent
from engine_core.messages import (
    BlockEvents,
    BlockSnapshot,
    Failed,
    LinkStats,
    Load,
    Measured,
    Tokens,
    WorkerInfo,
    WorkerStats,
)
from engine_core.types import Role
from kv_transfer.control import ControlClient
from router.block_feed import BlockFeed
from router.block_index import BlockIndex
from router.candidate import Candidate
from router.clients import MakeClient
from router.cost_model import StepModel, TransferModel, fade

if TYPE_CHECKING:
    from router.stream import Stream

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.25


class FleetListener(Protocol):
    """Who hears what workers say."""

    def on_tokens(self, message: Tokens, now: float) -> None:
        """New tokens."""
        ...

    def on_failed(self, worker: WorkerState, message: Failed) -> None:
        """A request ended without an answer."""
        ...

    def on_lost(self, worker: WorkerState, error: BatonError) -> None:
        """All that was asked of the worker is lost."""
        ...

    def on_leaving(self, worker: WorkerState) -> None:
        """The worker drains: it finishes what nobody takes from it."""
        ...

    def on_room(self, now: float) -> None:
        """Some worker may have room for more."""
        ...


class WorkerState:
    """One life of one worker, as this gateway sees it. Hears its connection (`WorkerEvents`).

    Attributes:
        candidate: as placement sees it.
        feed: what it says of its prefix cache; None where it keeps none.
        stats: what it said last of what it has counted.
        connected: whether it said that it is this very incarnation.
        leaving: no longer a member: it may finish what it has, and gets nothing new.
        streams: those of this gateway that need it.
        donations: those for whose prompts it may hold blocks; they do without, if it is lost.
    """

    def __init__(self, info: WorkerInfo, registry: Registry, make_client: MakeClient) -> None:
        self.info = info
        self.candidate = Candidate(info, StepModel(registry.teacher(info.role)))
        self.feed = BlockFeed(registry.index, self.candidate.key) if info.block_namespace else None
        self.stats: WorkerStats | None = None
        self.connected = False
        self.leaving = False
        self.streams: set[Stream] = set()
        self.donations: set[Stream] = set()
        self._registry = registry
        self._listener = registry.listener
        self.client = make_client(info.address, self)

    @property
    def load(self) -> Load | None:
        """Its last beat."""
        return self.candidate.load

    @property
    def usable(self) -> bool:
        """Whether it may get new requests."""
        return self.connected and not self.leaving and not (self.load is not None and self.load.draining)

    @property
    def name(self) -> str:
        """For logs and metrics."""
        return f"{self.info.worker_id}.{self.info.incarnation}"

    # WorkerEvents

    def on_connected(self, client: ControlClient, info: WorkerInfo) -> None:
        """The worker said who it is."""
        if (info.worker_id, info.incarnation) != (self.info.worker_id, self.info.incarnation):
            logger.warning("expected worker %s, found %s.%d", self.name, info.worker_id, info.incarnation)
            return
        reached_at = self.info.address  # the fleet knows best how to reach it
        self.info = self.candidate.info = msgspec.structs.replace(info, address=reached_at)
        self.connected = True
        self.candidate.suspect = False
        if self.feed is not None:
            client.send(self.feed.connected(client.heard_at))
        logger.info("worker %s (%s) connected", self.name, info.role)
        self._registry.changed()

    def on_tokens(self, client: ControlClient, message: Tokens) -> None:
        """New tokens of this gateway's requests."""
        self._listener.on_tokens(message, client.heard_at)

    def on_failed(self, client: ControlClient, message: Failed) -> None:
        """A request ended without an answer."""
        self._listener.on_failed(self, message)

    def on_load(self, client: ControlClient, message: Load) -> None:
        """The progress beat."""
        before = self.usable
        self.candidate.told(message, client.heard_at)
        if not self.connected and client.info is not None:  # it was silent, and is back
            self.on_connected(client, client.info)
        if self.usable != before:
            self._registry.changed()
        if message.draining and before:
            self._listener.on_leaving(self)
        self._listener.on_room(client.heard_at)

    def on_measured(self, client: ControlClient, message: Measured) -> None:
        """How long some steps took."""
        self.candidate.steps.learn(message.steps, asyncio.get_running_loop().time())

    def on_blocks(self, client: ControlClient, message: BlockEvents | BlockSnapshot) -> None:
        """What its prefix cache holds."""
        if self.feed is None:
            return
        if isinstance(message, BlockEvents):
            self.feed.on_events(message, client.heard_at)
        else:
            self.feed.on_snapshot(message, client.heard_at)
        self._registry.fold_soon()

    def on_stats(self, client: ControlClient, message: WorkerStats) -> None:
        """What it has counted."""
        before, self.stats = self.stats, message
        if before is not None:
            self._registry.learn_fetches(self, before.links, message.links)

    def on_lost(self, client: ControlClient, error: BatonError) -> None:
        """The connection ended; the client reconnects by itself."""
        self.lose(error)

    def tick(self, now: float) -> None:
        """A few times a second: ask for what its feed lacks."""
        question = self.feed.tick(now) if self.feed is not None and self.connected else None
        if question is not None:
            with contextlib.suppress(WorkerDied):  # `lose` follows
                self.client.send(question)

    def lose(self, error: BatonError) -> None:
        """Give up what was asked of it."""
        if self.connected:
            logger.warning("worker %s lost with %d requests: %s", self.name, len(self.streams), error)
        self.connected = False
        self.candidate.lost()
        if self.feed is not None:
            self.feed.lost(asyncio.get_running_loop().time())
        self._registry.changed()
        self._listener.on_lost(self, error)


class Registry:
    """The members of the fleet, and a connection to each.

    Args:
        index, transfers: shared with placement; workers fill them.

    Attributes:
        prefill, decode: workers that may get new requests.
        candidates: all workers by role, as placement sees them.
        leaving: whether some worker left and still has requests of ours.
        max_model_len: tokens of prompt plus answer that all of them take; 0 before there were any.
    """

    def __init__(
        self,
        listener: FleetListener,
        make_client: MakeClient,
        *,
        index: BlockIndex,
        transfers: TransferModel,
        colocated: bool,
        suspect_after_s: float,
        lost_after_s: float,
    ) -> None:
        self.listener = listener
        self.index = index
        self.candidates: dict[Role, list[Candidate]] = {role: [] for role in Role}
        self._transfers = transfers
        self.workers: dict[tuple[str, int], WorkerState] = {}
        self.prefill: list[WorkerState] = []
        self.decode: list[WorkerState] = []
        self.leaving = False
        self.max_model_len = 0
        self.fingerprint = ""
        self.numerics = "fast"
        self._make_client = make_client
        self._colocated = colocated
        self._suspect_after_s = suspect_after_s
        self._lost_after_s = lost_after_s
        self._folding = False
        self._waiting = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._watch_task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether every role that the fleet shall have is there."""
        return bool(self.decode) and (self._colocated or bool(self.prefill))

    def start(self) -> None:
        """Begin to watch for silent workers."""
        self._watch_task = asyncio.get_running_loop().create_task(self._watch())

    def update(self, infos: Sequence[WorkerInfo]) -> None:
        """These are the members, and no others."""
        members = {(info.worker_id, info.incarnation): info for info in infos}
        lives = {info.worker_id: info.incarnation for info in infos}
        left = []
        for key, worker in list(self.workers.items()):
            if key in members:
                worker.leaving = False
                continue
            if not worker.leaving:
                left.append(worker)
            worker.leaving = True
            if worker.info.worker_id in lives:  # a later life: this one has ended
                worker.lose(WorkerDied(f"worker {worker.name} was replaced"))
        for key, info in members.items():
            if key not in self.workers:
                worker = self.workers[key] = WorkerState(info, self, self._make_client)
                worker.client.start()
        self.changed()
        for worker in left:
            self.listener.on_leaving(worker)

    def changed(self) -> None:
        """Some worker became usable or ceased to be."""
        usable = [worker for worker in self.workers.values() if worker.usable]
        for role in Role:
            self.candidates[role] = [w.candidate for w in self.workers.values() if w.info.role is role]
        for worker in self.workers.values():
            worker.candidate.usable = worker.usable
            worker.candidate.connected = worker.connected
        self.prefill = [worker for worker in usable if worker.info.role is Role.PREFILL]
        self.decode = [worker for worker in usable if worker.info.role is Role.DECODE]
        self.leaving = any(worker.leaving for worker in self.workers.values())
        self.forget_idle()
        if self.decode:
            self.max_model_len = min(worker.info.max_model_len for worker in usable)
            self.fingerprint = self.decode[0].info.fingerprint
            self.numerics = str(self.decode[0].info.numerics)
        waiting, self._waiting = self._waiting, asyncio.Event()
        waiting.set()

    async def wait_for_change(self) -> None:
        """Return when `changed` is next called."""
        await self._waiting.wait()

    async def until_connected(self, timeout_s: float) -> None:
        """Return when every member has said who it is, or after that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not all(worker.connected for worker in self.workers.values()):
                    await self.wait_for_change()

    def forget_idle(self) -> None:
        """Hang up on workers that left and have nothing of ours any more."""
        if not self.leaving:
            return
        for key, worker in list(self.workers.items()):
            if worker.leaving and not worker.streams and not worker.donations:
                del self.workers[key]
                self.candidates[worker.info.role].remove(worker.candidate)
                self._forget(worker)
                task = asyncio.get_running_loop().create_task(worker.client.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    def fold_soon(self) -> None:
        """What the workers said in this round of the loop is folded at its end, before any decision needs it."""
        if not self._folding:
            self._folding = True
            asyncio.get_running_loop().call_soon(self._fold)

    def _fold(self) -> None:
        self._folding = False
        self.index.fold()

    def teacher(self, role: Role) -> StepModel | None:
        """A worker of this role whose steps are known well."""
        models = (worker.candidate.steps for worker in self.workers.values() if worker.info.role is role)
        return next((model for model in models if model.is_trusted), None)

    def learn_fetches(
        self, receiver: WorkerState, before: Mapping[str, LinkStats], links: Mapping[str, LinkStats]
    ) -> None:
        """What a worker's fetches from donors took since it last told.

        Links from prefill to decode workers are measured at each hand-over: workers' own times contain prefill there.
        """
        senders: dict[str, WorkerState] | None = None
        for address, link in links.items():
            known = before.get(address)
            count = link.transfers - (known.transfers if known else 0)
            if count <= 0:
                continue
            if senders is None:
                senders = {worker.info.address.kv_name: worker for worker in self.workers.values()}
            sender = senders.get(address)
            if sender is None or (sender.info.role is Role.PREFILL and receiver.info.role is Role.DECODE):
                continue
            num_bytes = link.num_bytes - (known.num_bytes if known else 0)
            seconds = link.seconds - (known.seconds if known else 0.0)
            self._transfers.learn(sender.candidate.key, receiver.candidate.key, num_bytes // count, seconds / count)

    def _forget(self, worker: WorkerState) -> None:
        if worker.feed is not None:
            worker.feed.close()
        self._transfers.forget(worker.candidate.key)

    async def close(self) -> None:
        """Hang up on all workers."""
        if self._watch_task is not None:
            self._watch_task.cancel()
        for worker in self.workers.values():
            await worker.client.close()
        self.workers.clear()
        await asyncio.gather(*self._closing)

    async def _watch(self) -> None:
        """Workers beat at least every second; one that does not is hung."""
        loop = asyncio.get_running_loop()
        late = 0.0  # how long this loop itself was held up: silence then proves nothing
        while True:
            due = loop.time() + WATCH_INTERVAL_S
            await asyncio.sleep(WATCH_INTERVAL_S)
            now = loop.time()
            late = max(late - WATCH_INTERVAL_S, now - due)
            self.index.tick(now)
            self._transfers.fit(now)
            for candidates in self.candidates.values():
                fade([candidate.steps for candidate in candidates], now)
            for worker in list(self.workers.values()):
                worker.tick(now)
                if worker.connected and worker.load is not None:
                    silent_s = now - worker.client.heard_at - late
                    worker.candidate.suspect = silent_s > self._suspect_after_s
                    if silent_s > self._lost_after_s:
                        worker.lose(WorkerSilent(f"worker {worker.name} has been silent for {silent_s:.1f} s"))
