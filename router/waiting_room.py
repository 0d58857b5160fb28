"""Streams that wait until the workers have room for them, behind the admission queue that orders them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine_core.errors import BatonError, CapacityError, NoWorkerAvailable, Overloaded
from engine_core.types import Role
from router.admission import AdmissionQueue, Entry
from router.config import GatewayConfig
from router.metrics import Metrics
from router.placement import JointPlacement
from router.registry import Registry
from router.stream import Stream
from router.wishes import Wishes


class WaitingRoom:
    """Places streams, at once where there is room and nobody waits, else when their turn has come.

    Args:
        place: gives a stream its first placement, now; raises BatonError where it cannot be served.
    """

    def __init__(
        self,
        config: GatewayConfig,
        registry: Registry,
        placement: JointPlacement,
        metrics: Metrics,
        place: Callable[[Stream, float], None],
    ) -> None:
        self._config = config
        self._registry = registry
        self._placement = placement
        self._metrics = metrics
        self._place = place
        self._queue = AdmissionQueue(config.max_waiting, config.weights())
        self._waiting: dict[Entry, tuple[Stream, asyncio.Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def admit_at_once(self, stream: Stream, wishes: Wishes, now: float) -> bool:
        """Place the stream if nobody waits and there is room; returns whether it was. Raises as `admit` does."""
        stream.due = None if wishes.ttft_s is None else stream.arrived_at + wishes.ttft_s
        if self._waiting or not self._has_room(now):
            return False
        self._queue.passed(now)
        self._place(stream, now)
        return True

    async def admit(self, stream: Stream, wishes: Wishes, now: float) -> None:
        """Return once the stream has been placed.

        Raises:
            Overloaded: too many wait, or it would take too long.
            CapacityError: no worker, or the gateway is closing.
        """
        if self.admit_at_once(stream, wishes, now):
            return
        candidates = self._registry.candidates
        least_s = self._placement.least_queue_s(candidates[Role.PREFILL], candidates[Role.DECODE], now)
        if stream.due is not None and now + least_s > stream.due:
            raise too_late(least_s)
        config = self._config
        ttft_s = min(config.max_wait_s if wishes.ttft_s is None else wishes.ttft_s, config.request_timeout_s)
        cost = self._placement.expected_tokens(stream.request)
        entry = Entry(wishes.tenant, wishes.priority, cost, stream.arrived_at + ttft_s)
        victim = self._queue.offer(entry, now)
        if victim is not None:
            self._refuse(victim)
        loop = asyncio.get_running_loop()
        placed = loop.create_future()
        self._waiting[entry] = (stream, placed)
        self._metrics.num_waiting = len(self._waiting)
        try:
            await placed
        finally:
            self._queue.cancel(entry)
            self._waiting.pop(entry, None)
            self._metrics.num_waiting = len(self._waiting)
            self._metrics.queue_wait.observe(loop.time() - now)

    def on_room(self, now: float) -> None:
        """Place those that wait, as long as there is room."""
        while self._waiting and self._has_room(now):
            entry = self._queue.take(now)
            if entry is None:
                return
            stream, placed = self._waiting.pop(entry)
            if placed.done():
                continue
            try:
                self._place(stream, now)
            except BatonError as error:
                placed.set_exception(error)
            else:
                placed.set_result(None)

    def expire(self, now: float) -> None:
        """Refuse those whose deadline has passed."""
        for entry in self._queue.expire(now):
            self._refuse(entry)

    def close(self, error: CapacityError) -> None:
        """Nobody will be placed any more."""
        for _, placed in self._waiting.values():
            if not placed.done():
                placed.set_exception(error)

    def _refuse(self, entry: Entry) -> None:
        _, placed = self._waiting.pop(entry)
        if not placed.done() and entry.refusal is not None:
            nobody = NoWorkerAvailable("no decode worker is available; try again later")
            placed.set_exception(entry.refusal if self._registry.decode else nobody)

    def _has_room(self, now: float) -> bool:
        candidates = self._registry.candidates
        return self._placement.has_room(candidates[Role.PREFILL], candidates[Role.DECODE], now)


def too_late(seconds: float) -> Overloaded:
    """The first token would come so late."""
    return Overloaded(f"the first token would take about {seconds:.3f} s", "deadline", max(1.0, seconds))
