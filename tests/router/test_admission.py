"""The queue: order, shares, refusals."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from engine_core.errors import Overloaded
from router.admission import IDLE_TENANTS, MIN_SERVED, AdmissionQueue, Entry


def entry(tenant: str = "t", priority: int = 0, cost: float = 1.0, deadline: float = 1e9) -> Entry:
    return Entry(tenant, priority, cost, deadline)


def drain(queue: AdmissionQueue, now: float = 0.0) -> list[Entry]:
    taken = []
    while (item := queue.take(now)) is not None:
        taken.append(item)
    return taken


def test_priority_first_then_the_earliest_deadline_within_a_tenant() -> None:
    queue = AdmissionQueue(10, {})
    late, soon, high = entry(deadline=9.0), entry(deadline=5.0), entry(priority=1, deadline=99.0)
    for item in (late, soon, high):
        queue.offer(item, 0.0)
    assert drain(queue) == [high, soon, late]
    assert len(queue) == 0


def test_equal_deadlines_are_first_come_first_served() -> None:
    queue = AdmissionQueue(100, {})
    entries = [entry() for _ in range(20)]
    for item in entries:
        queue.offer(item, 0.0)
    assert drain(queue) == entries


def test_tenants_share_by_weight_and_cost() -> None:
    queue = AdmissionQueue(10_000, {"heavy": 3.0})
    for _ in range(600):
        queue.offer(entry("heavy"), 0.0)
        queue.offer(entry("light"), 0.0)
        queue.offer(entry("costly", cost=2.0), 0.0)
    counts = Counter(queue.take(0.0).tenant for _ in range(450))
    assert counts == {
        "heavy": pytest.approx(300, abs=3),
        "light": pytest.approx(100, abs=3),
        "costly": pytest.approx(50, abs=3),
    }


def test_a_flood_of_one_tenant_does_not_delay_another() -> None:
    queue = AdmissionQueue(10_000, {})
    for _ in range(1000):
        queue.offer(entry("flood"), 0.0)
    for _ in range(500):
        queue.take(0.0)
    quiet = entry("quiet")
    queue.offer(quiet, 0.0)
    assert quiet in [queue.take(0.0) for _ in range(2)]


def test_idleness_saves_up_nothing() -> None:
    queue = AdmissionQueue(10_000, {})
    queue.offer(entry("idle"), 0.0)
    for _ in range(300):
        queue.offer(entry("busy"), 0.0)
    for _ in range(201):
        queue.take(0.0)
    for _ in range(100):
        queue.offer(entry("idle"), 0.0)
    assert Counter(queue.take(0.0).tenant for _ in range(40)) == {"idle": 20, "busy": 20}


def test_tenants_that_come_once_are_forgotten() -> None:
    """As many as users have ids; of those remembered, one that has had far more than its share still waits longest."""
    queue = AdmissionQueue(100, {})
    queue.offer(entry("greedy", cost=1e6), 0.0)
    queue.take(0.0)
    for index in range(3 * IDLE_TENANTS):
        queue.offer(entry(f"user-{index}"), 0.0)
        drain(queue)
    assert len(queue._virtual) <= IDLE_TENANTS
    queue.offer(entry("greedy"), 0.0)
    queue.offer(entry("new"), 0.0)
    assert [item.tenant for item in drain(queue)] == ["new", "greedy"]


def test_the_queue_is_bounded_and_lower_priorities_make_way() -> None:
    queue = AdmissionQueue(3, {})
    low = [entry(priority=-1, deadline=100.0 + i) for i in range(3)]
    for item in low:
        assert queue.offer(item, 0.0) is None
    with pytest.raises(Overloaded) as refused:
        queue.offer(entry(priority=-1), 0.0)
    assert (refused.value.http_status, refused.value.reason) == (429, "queue_full")
    high = entry(priority=2)
    victim = queue.offer(high, 0.0)
    assert victim is low[2]
    assert victim.refusal.reason == "queue_full"
    assert drain(queue) == [high, low[0], low[1]]


def test_what_cannot_meet_its_deadline_is_refused_at_once() -> None:
    queue = AdmissionQueue(1000, {})
    for _ in range(200):
        queue.offer(entry(), 0.0)
    now = 0.0
    for _ in range(5 * MIN_SERVED):
        now += 0.1
        queue.take(now)
    wait_s = queue.wait_s(0, now)
    assert 10 < wait_s < 30  # 160 ahead at about 10/s
    with pytest.raises(Overloaded) as refused:
        queue.offer(entry(deadline=now + 5), now)
    assert (refused.value.reason, refused.value.retry_after_s) == ("deadline", pytest.approx(wait_s))
    assert queue.offer(entry(deadline=now + 60), now) is None
    assert queue.offer(entry(priority=1, deadline=now + 0.1), now) is None  # nobody is ahead of it


@pytest.mark.parametrize("silence_s", [10.0, 25.0, 50.0])
def test_a_silence_is_no_standstill(silence_s: float) -> None:
    """Long answers hold their places: nothing is served for a while, and then all that wait."""
    queue = AdmissionQueue(1000, {})
    for index in range(2 * MIN_SERVED):
        queue.passed(index / 10)
    now = queue_began = 1.5 + silence_s
    while now < queue_began + 1:
        queue.offer(entry(deadline=now + 60), now)
        now += 0.1
    assert silence_s / 4 < queue.wait_s(0, now) < 2 * silence_s, "as many as then take about as long"


def test_entries_expire() -> None:
    queue = AdmissionQueue(10, {})
    first, second, cancelled = entry(deadline=1.0), entry(deadline=2.0), entry(deadline=0.5)
    for item in (first, second, cancelled):
        queue.offer(item, 0.0)
    queue.cancel(cancelled)
    assert queue.expire(1.5) == [first]
    assert first.refusal.reason == "deadline"
    assert drain(queue) == [second]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_or_served_twice(seed: int) -> None:
    rng = random.Random(seed)
    queue = AdmissionQueue(50, {"a": 2.0})
    now, waiting, gone = 0.0, set(), []
    for _ in range(2000):
        now += 0.01
        kind = rng.random()
        if kind < 0.5:
            item = entry(rng.choice("abcd"), rng.randrange(3), rng.random() + 0.1, now + rng.random() * 3)
            try:
                victim = queue.offer(item, now)
            except Overloaded:
                continue
            waiting.add(item)
            if victim is not None:
                waiting.remove(victim)
        elif kind < 0.6 and waiting:
            item = rng.choice(sorted(waiting, key=id))
            waiting.remove(item)
            queue.cancel(item)
            queue.cancel(item)
        elif kind < 0.65:
            late = queue.expire(now)
            assert all(item.deadline <= now for item in late)
            waiting.difference_update(late)
        elif (item := queue.take(now)) is not None:
            assert item in waiting
            assert item.priority == max(other.priority for other in waiting)
            waiting.remove(item)
            gone.append(item)
        assert len(queue) == len(waiting) <= 50
    assert set(drain(queue)) == waiting
    assert len(gone) == len(set(gone)) > 100
