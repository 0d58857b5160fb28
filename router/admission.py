"""Requests that wait for room: strict priorities, weighted fairness between tenants, earliest deadline within one.

Fairness is start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): each tenant has a virtual time that grows by
what it is served over its weight; the least goes first, and one that comes back from idleness starts where the others
are.

Sans-I/O: time and entries go in, the next entry or a refusal comes out. What cannot meet its deadline is refused when
it comes, not when its time is over.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine_core.errors import Overloaded

RATE_WINDOW_S = 5.0  # over which the rate of service is averaged
MIN_SERVED = 8  # before a rate is believed
IDLE_TENANTS = 1024  # remembered


@dataclass(eq=False, slots=True)
class Entry:
    """One request that waits.

    Attributes:
        tenant: whose share it takes.
        priority: larger goes first.
        cost: in whatever unit all entries use, such as prompt tokens; > 0.
        deadline: when its first token is due.
        refusal: set where it was refused after it had been queued.
    """

    tenant: str
    priority: int
    cost: float
    deadline: float
    is_waiting: bool = field(default=False, init=False)
    refusal: Overloaded | None = field(default=None, init=False)


Heap = list[tuple[float, int, Entry]]


class AdmissionQueue:
    """See the module.

    Args:
        max_waiting: entries at most.
        weights: of tenants; 1 for those not named.
    """

    def __init__(self, max_waiting: int, weights: Mapping[str, float]) -> None:
        self._max_waiting = max_waiting
        self._weights = weights
        self._bands: dict[int, dict[str, Heap]] = {}
        self._virtual: dict[str, float] = {}
        self._now_virtual = 0.0
        self._serials = itertools.count()
        self._waiting_of: dict[int, int] = {}
        self._served = 0.0
        self._served_at: float | None = None
        self._num_served = 0

    def __len__(self) -> int:
        return sum(self._waiting_of.values())

    def offer(self, entry: Entry, now: float) -> Entry | None:
        """Queue an entry.

        Returns:
            One of lower priority that had to go for it, with its `refusal` set; None as a rule.

        Raises:
            Overloaded: the queue is full, or the entry would wait beyond its deadline.
        """
        wait_s = self.wait_s(entry.priority, now)
        if now + wait_s >= entry.deadline:
            raise self._refusal("deadline", f"the first token would take about {wait_s:.1f} s", wait_s)
        victim = None
        if len(self) >= self._max_waiting:
            victim = self._last_below(entry.priority)
            if victim is None:
                raise self._refusal("queue_full", f"{len(self)} requests are waiting already", wait_s)
            self.cancel(victim)
            victim.refusal = self._refusal("queue_full", "the queue is full of more urgent requests", wait_s)
        band = self._bands.setdefault(entry.priority, {})
        if entry.tenant not in band:
            band[entry.tenant] = []
            self._virtual[entry.tenant] = max(self._virtual.get(entry.tenant, 0.0), self._now_virtual)
        heapq.heappush(band[entry.tenant], (entry.deadline, next(self._serials), entry))
        entry.is_waiting = True
        self._waiting_of[entry.priority] = self._waiting_of.get(entry.priority, 0) + 1
        return victim

    def cancel(self, entry: Entry) -> None:
        """The entry leaves the queue; it may have left before."""
        if entry.is_waiting:
            entry.is_waiting = False
            self._waiting_of[entry.priority] -= 1

    def take(self, now: float) -> Entry | None:
        """The next entry; None when nothing waits."""
        for priority in sorted(self._bands, reverse=True):
            entry = self._take_from(self._bands[priority])
            if entry is not None:
                self._count_served(now)
                return entry
            del self._bands[priority]
        return None

    def passed(self, now: float) -> None:
        """A request was placed without waiting: it tells of the rate of service, too."""
        self._count_served(now)

    def expire(self, now: float) -> list[Entry]:
        """Entries whose deadline has passed leave the queue; each has its `refusal`."""
        late: list[Entry] = []
        for band in self._bands.values():
            for heap in band.values():
                while heap and (heap[0][0] <= now or not heap[0][2].is_waiting):
                    entry = heapq.heappop(heap)[2]
                    if entry.is_waiting:
                        self.cancel(entry)
                        wait_s = self.wait_s(entry.priority, now)
                        entry.refusal = self._refusal("deadline", "the request waited too long for a worker", wait_s)
                        late.append(entry)
        return late

    def wait_s(self, priority: int, now: float) -> float:
        """How long a new entry of this priority would wait, from the rate of late; 0 while nothing is known."""
        ahead = sum(count for other, count in self._waiting_of.items() if other >= priority)
        rate = self._rate(now)
        return ahead / rate if ahead and rate > 0 else 0.0

    def _take_from(self, band: dict[str, Heap]) -> Entry | None:
        for tenant in [tenant for tenant, heap in band.items() if not _trim(heap)]:
            del band[tenant]
        if not band:
            return None
        tenant = min(band, key=lambda name: self._virtual[name])
        entry = heapq.heappop(band[tenant])[2]
        self.cancel(entry)
        self._now_virtual = self._virtual[tenant]
        self._virtual[tenant] += entry.cost / self._weights.get(tenant, 1.0)
        if len(self._virtual) > IDLE_TENANTS + len(self):
            self._forget_idle()
        return entry

    def _forget_idle(self) -> None:
        """Of those that do not wait, half as many as may be remembered: those that have had most beyond their share."""
        active = {tenant for band in self._bands.values() for tenant in band}
        idle = sorted((tenant for tenant in self._virtual if tenant not in active), key=lambda one: self._virtual[one])
        for tenant in idle[: -IDLE_TENANTS // 2]:
            del self._virtual[tenant]

    def _last_below(self, priority: int) -> Entry | None:
        """The entry that would be served last, if its priority is lower."""
        waiting = [other for other, count in self._waiting_of.items() if count]
        if not waiting or min(waiting) >= priority:
            return None
        heaps = self._bands[min(waiting)].values()
        return max((item for heap in heaps for item in heap if item[2].is_waiting), key=lambda item: item[:2])[2]

    def _count_served(self, now: float) -> None:
        self._served = self._decayed(now) + 1.0
        self._served_at = now
        self._num_served += 1

    def _decayed(self, now: float) -> float:
        if self._served_at is None:
            return 0.0
        return self._served * math.exp(min(0.0, self._served_at - now) / RATE_WINDOW_S)

    def _rate(self, now: float) -> float:
        """Entries taken per second, lately.

        A silence lengthens the window, no more: those who hold their places for long leave together, as they came.
        """
        if self._served_at is None or self._num_served < MIN_SERVED:
            return 0.0
        return self._served / (RATE_WINDOW_S + max(0.0, now - self._served_at))

    @staticmethod
    def _refusal(reason: str, text: str, wait_s: float) -> Overloaded:
        return Overloaded(f"the service is overloaded: {text}; try again later", reason, max(1.0, wait_s))


def _trim(heap: Heap) -> bool:
    """Drop cancelled entries from the front; whether any is left."""
    while heap and not heap[0][2].is_waiting:
        heapq.heappop(heap)
    return bool(heap)
