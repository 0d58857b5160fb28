"""Which workers there are, and how busy each is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from engine_core.errors import BatonError, WorkerDied
from engine_core.messages import Failed, Load, Tokens, WorkerInfo, WorkerStats
from engine_core.types import Role
from kv_transfer.control import ControlClient
from router.clients import MakeClient

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


class WorkerState:
    """One life of one worker, as this gateway sees it. Hears its connection (`WorkerEvents`).

    Attributes:
        load: its last beat.
        stats: what it said last of what it has counted.
        connected: whether it said that it is this very incarnation.
        leaving: no longer a member: it may finish what it has, and gets nothing new.
        suspect: silent for longer than it should be.
        streams: those of this gateway that need it.
        reserved_requests, reserved_tokens: of those streams (tokens: prompts that it has not finished reading).
        placed_requests, placed_tokens: of these, what its last beat cannot know of yet.
    """

    def __init__(self, info: WorkerInfo, registry: Registry, make_client: MakeClient) -> None:
        self.info = info
        self.load: Load | None = None
        self.stats: WorkerStats | None = None
        self.connected = False
        self.leaving = False
        self.suspect = False
        self.streams: set[Stream] = set()
        self.reserved_requests = 0
        self.reserved_tokens = 0
        self.placed_requests = 0
        self.placed_tokens = 0
        self.turn = 0
        self._registry = registry
        self._listener = registry.listener
        self.client = make_client(info.address, self)

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
        self.info = info
        self.connected = True
        self.suspect = False
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
        self.load = message
        if not self.connected and client.info is not None:  # it was silent, and is back
            self.on_connected(client, client.info)
        self.placed_requests = 0
        self.placed_tokens = 0
        if self.usable != before:
            self._registry.changed()

    def on_stats(self, client: ControlClient, message: WorkerStats) -> None:
        """What it has counted."""
        self.stats = message

    def on_lost(self, client: ControlClient, error: BatonError) -> None:
        """The connection ended; the client reconnects by itself."""
        self.lose(error)

    def lose(self, error: BatonError) -> None:
        """Give up what was asked of it."""
        if self.connected:
            logger.warning("worker %s lost with %d requests: %s", self.name, len(self.streams), error)
        self.connected = False
        self.load = None
        self._registry.changed()
        self._listener.on_lost(self, error)


class Registry:
    """The members of the fleet, and a connection to each.

    Attributes:
        prefill, decode: workers that may get new requests.
        leaving: whether some worker left and still has requests of ours.
        max_model_len: tokens of prompt plus answer that all of them take; 0 before there were any.
    """

    def __init__(
        self,
        listener: FleetListener,
        make_client: MakeClient,
        *,
        colocated: bool,
        suspect_after_s: float,
        lost_after_s: float,
    ) -> None:
        self.listener = listener
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
        for key, worker in list(self.workers.items()):
            if key in members:
                worker.leaving = False
                continue
            worker.leaving = True
            if worker.info.worker_id in lives:  # a later life: this one has ended
                worker.lose(WorkerDied(f"worker {worker.name} was replaced"))
        for key, info in members.items():
            if key not in self.workers:
                worker = self.workers[key] = WorkerState(info, self, self._make_client)
                worker.client.start()
        self.changed()

    def changed(self) -> None:
        """Some worker became usable or ceased to be."""
        usable = [worker for worker in self.workers.values() if worker.usable]
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

    def forget_idle(self) -> None:
        """Hang up on workers that left and have nothing of ours any more."""
        if not self.leaving:
            return
        for key, worker in list(self.workers.items()):
            if worker.leaving and not worker.streams:
                del self.workers[key]
                task = asyncio.get_running_loop().create_task(worker.client.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

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
            for worker in list(self.workers.values()):
                if worker.connected and worker.load is not None:
                    silent_s = now - worker.client.heard_at - late
                    worker.suspect = silent_s > self._suspect_after_s
                    if silent_s > self._lost_after_s:
                        worker.lose(WorkerDied(f"worker {worker.name} has been silent for {silent_s:.1f} s"))
