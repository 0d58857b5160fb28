"""Prompts whose leading blocks are fetched, over the fake engine: what lands, what is computed, who goes first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from engine_core.messages import PeerAddress, TokenChunk
from prefill_worker import fetches
from prefill_worker.fetches import Source
from prefill_worker.scheduler import PrefillScheduler
from tests.fake_engine import fake_replica, next_token
from tests.prefill_worker.test_scheduler import Events, assert_released, request, run, sent_tokens

DONOR = PeerAddress("127.0.0.1", 1, 2)
PROMPT = list(range(10, 40))
NUM_BLOCKS = 7  # that can be fetched
KEY = ("a", 0)
EMPTY = TokenChunk("a", 0, 0, [])


class FetchEvents(Events):
    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, dict[int, int]] = {}
        self.abandoned: list[str] = []

    def fetch(self, key, donor, wanted) -> None:
        assert donor == DONOR and key[0] not in self.asked
        self.asked[key[0]] = dict(wanted)

    def fetch_abandoned(self, key) -> None:
        self.abandoned.append(key[0])


class Side:
    """A scheduler, and the donor that a test plays."""

    def __init__(self, **options) -> None:
        self.replica, self.events, self.now = fake_replica(**options), FetchEvents(), 100.0
        self.scheduler = PrefillScheduler(self.replica, self.events, clock=lambda: self.now)

    def add(
        self, num_blocks: int = NUM_BLOCKS, *, prompt: list[int] = PROMPT, deadline_s: float = 60.0, **sampling
    ) -> list[int]:
        """Take the prompt; the blocks that the donor is asked for."""
        self.scheduler.add(request("a", prompt, **sampling), Source(DONOR, num_blocks, deadline_s))
        self.scheduler.grant(KEY, range(8))
        return list(self.events.asked["a"])

    def read(self, name: str, prompt: list[int]) -> None:
        self.scheduler.add(request(name, prompt))
        self.scheduler.grant((name, 0), [])
        run(self.scheduler)

    def arrive(self, blocks: Sequence[int], *, older: int = 0) -> None:
        generations = [self.events.asked["a"][block] - older for block in blocks]
        layer = np.array([PROMPT[4 * block : 4 * block + 4] for block in blocks], np.float32)[:, :, None, None]
        self.scheduler.fetched(KEY, list(blocks), [layer], generations)

    def end(self, lost: Sequence[int] = ()) -> None:
        self.scheduler.fetch_ended(KEY, EMPTY, lost)

    def assert_answered(self, num_cached: int) -> None:
        assert self.events.first["a"].token_ids == [next_token(PROMPT)]
        assert self.events.first["a"].cached_tokens == num_cached
        assert sent_tokens(self.events, "a", len(PROMPT)) == PROMPT
        assert self.events.done[-1] == "a"
        assert_released(self.replica)


@pytest.mark.parametrize("row_shards", [1, 2])
def test_fetched_blocks_are_not_computed(row_shards):
    side = Side(row_shards=row_shards)
    assert side.add() == list(range(NUM_BLOCKS))
    assert not side.scheduler.tick() and side.scheduler.num_waiting == 1
    side.arrive(range(NUM_BLOCKS))
    side.end()
    run(side.scheduler)
    assert side.replica.engine.num_steps == 1
    stored = {event.block_hash for event in side.replica.drain_block_events()}
    assert len(stored) == NUM_BLOCKS, "others are told of them"
    side.assert_answered(4 * NUM_BLOCKS)


def test_only_what_is_lacking_is_fetched():
    side = Side()
    side.read("b", [*PROMPT[:9], 3, 3])
    assert side.add() == [2, 3, 4, 5, 6]
    side.arrive([2, 3, 4, 5, 6])
    side.end()
    run(side.scheduler)
    side.assert_answered(4 * NUM_BLOCKS)


def test_blocks_leave_for_decode_as_soon_as_they_have_landed():
    side = Side()
    side.read("b", [*PROMPT[:9], 3, 3])
    side.add()
    run(side.scheduler)
    assert sorted(side.events.sent["a"]) == [0, 1]
    side.arrive([3, 4])
    run(side.scheduler)
    assert sorted(side.events.sent["a"]) == [0, 1, 3, 4] and "a" not in side.events.first
    side.arrive([2, 5, 6])
    side.end()
    run(side.scheduler)
    side.assert_answered(4 * NUM_BLOCKS)


def test_what_is_on_its_way_is_not_queued_and_what_does_not_come_is():
    """Gateways take what is queued for seconds that the next prompt waits."""
    side = Side()
    side.add()
    assert side.scheduler.queued_tokens == len(PROMPT) - 4 * NUM_BLOCKS
    side.arrive([0, 1])
    side.scheduler.tick()
    assert side.scheduler.queued_tokens == len(PROMPT) - 4 * NUM_BLOCKS
    side.scheduler.fetch_failed(KEY)
    assert side.scheduler.queued_tokens == len(PROMPT)
    run(side.scheduler)
    assert side.scheduler.queued_tokens == 0


def test_others_go_before_a_prompt_that_is_fetched_which_keeps_its_place():
    side = Side()
    side.add()
    side.read("b", list(range(50, 70)))
    assert side.events.done == ["b"] and "a" not in side.events.first
    side.arrive(range(NUM_BLOCKS))
    side.end()
    side.read("c", list(range(60, 80)))
    assert list(side.events.first) == ["b", "a", "c"]


@pytest.mark.parametrize("how", ["lost", "failed", "late"])
@pytest.mark.parametrize(("landed", "kept"), [([0, 1, 3], 2), ([], 0), ([1, 2], 0)])
def test_what_does_not_come_is_computed_from_the_first_gap_on(landed, kept, how):
    side = Side()
    side.add()
    if landed:
        side.arrive(landed)
    if how == "lost":
        side.end([i for i in range(NUM_BLOCKS) if i not in landed])
    elif how == "failed":
        side.scheduler.fetch_failed(KEY)
        side.scheduler.fetch_failed(KEY)
    else:
        side.scheduler.tick()
        side.now += fetches.FETCH_S
        side.scheduler.tick()
    assert side.events.abandoned == (["a"] if how == "late" else [])
    run(side.scheduler)
    side.assert_answered(4 * kept)


def test_a_donor_that_drips_is_given_up_in_time():
    for deadline_s, limit in ((60.0, fetches.FETCH_S), (4.0, 2.0)):
        side = Side()
        side.add(deadline_s=deadline_s)
        for block in range(NUM_BLOCKS):
            side.arrive([block])
            side.scheduler.tick()
            if side.events.abandoned:
                break
            side.now += 0.9
        assert side.now - 100 == pytest.approx(limit, abs=0.9)
        run(side.scheduler)
        side.assert_answered(4 * (block + 1))


def test_a_block_for_the_page_of_another_life_is_dropped():
    side = Side()
    side.add()
    before = side.replica.engine.cache.copy()
    side.arrive([0, 1], older=1)
    side.scheduler.tick()
    assert (side.replica.engine.cache == before).all()
    side.end()
    run(side.scheduler)
    side.assert_answered(0)


@pytest.mark.parametrize("when", ["asked", "arrived", "written", "ended", "computing"])
def test_cancel_at_any_time_frees_everything_and_late_blocks_land_nowhere(when):
    side = Side()
    side.add()
    if when != "asked":
        side.arrive([0, 1, 2])
    if when == "written":
        side.scheduler.tick()
    if when in ("ended", "computing"):
        side.end()
    if when == "computing":
        side.scheduler.tick()
    side.scheduler.cancel(KEY)
    side.scheduler.cancel(KEY)
    before = side.replica.engine.cache.copy()
    side.arrive([4, 5])
    side.end()
    side.scheduler.fetch_failed(KEY)
    run(side.scheduler)
    assert (side.replica.engine.cache == before).all()
    assert not side.events.done and len(side.scheduler._fetches) == 0
    side.read("b", PROMPT)
    expected = {"asked": 0, "computing": 20}.get(when, 12)
    assert side.events.first["b"].cached_tokens == expected, "what had landed is kept"
    assert_released(side.replica)


@pytest.mark.parametrize("why", ["nothing believed", "all here", "no cache", "no room", "full", "scored"])
def test_where_there_is_nothing_to_fetch_the_donor_is_told_and_nobody_waits(why):
    side = Side(prefix_cache=why != "no cache", num_pages={"no room": 12, "full": 16}.get(why, 64))
    if why == "all here":
        side.read("b", PROMPT)
    if why == "full":
        side.scheduler.add(request("b", list(range(20, 80))))
        side.scheduler.tick()
    num_blocks = 0 if why == "nothing believed" else NUM_BLOCKS
    assert side.add(num_blocks, prompt_logprobs=why == "scored") == []
    side.scheduler.cancel(("b", 0))
    run(side.scheduler)
    side.assert_answered(4 * NUM_BLOCKS if why == "all here" else 0)
