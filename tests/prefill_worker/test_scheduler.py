"""The prefill scheduler over the fake engine: chunks, blocks handed over, first tokens, pages after every end."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from engine_core.errors import NotFinite
from engine_core.types import FinishReason, Numerics, Request, SamplingParams
from prefill_worker.scheduler import PrefillScheduler
from tests.fake_engine import fake_replica, next_token, spoil


class Events:
    def __init__(self) -> None:
        self.first: dict[str, object] = {}
        self.sent: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        self.done: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.writable = True

    def tokens(self, chunk) -> None:
        self.first[chunk.request_id] = chunk

    def blocks(self, key, indices, layers) -> None:
        for i, index in enumerate(indices):
            assert index not in self.sent[key[0]]
            self.sent[key[0]][index] = layers[0][i, :, 0, 0]

    def failed(self, key, error) -> None:
        self.failures[key[0]] = error

    def finished(self, key, first_token) -> None:
        assert first_token == self.first[key[0]]
        self.done.append(key[0])


def request(name: str, prompt: list[int], **sampling) -> Request:
    return Request(name, list(prompt), len(prompt), SamplingParams(temperature=0.0, max_tokens=5, **sampling))


def run(scheduler: PrefillScheduler) -> None:
    idle = 0
    while idle < 3:
        idle = 0 if scheduler.tick() else idle + 1


def assert_released(replica) -> None:
    for shard in replica.memory.shards:
        pool = shard.cache.pool
        assert shard.num_sequences == 0
        assert shard.table.num_free == shard.table.num_slots
        shard.cache.check_integrity()
        shard.cache.clear()
        assert pool.free_count == pool.num_pages
        pool.check_integrity({})


def sent_tokens(events: Events, name: str, length: int) -> list[int]:
    return np.concatenate([events.sent[name][i] for i in sorted(events.sent[name])])[:length].astype(int).tolist()


@pytest.mark.parametrize("numerics", list(Numerics))
@pytest.mark.parametrize("ticket", ["before the prompt", "during", "after"])
@pytest.mark.parametrize("length", [1, 4, 7, 8, 9, 30])
def test_blocks_and_first_token(length, ticket, numerics):
    replica, events = fake_replica(numerics=numerics), Events()
    scheduler = PrefillScheduler(replica, events)
    prompt = [7 + i for i in range(length)]
    blocks = list(range(-(-length // 4)))
    scheduler.add(request("a", prompt))
    if ticket == "before the prompt":
        scheduler.grant(("a", 0), blocks)
    scheduler.tick()
    if ticket == "during":
        scheduler.grant(("a", 0), blocks)
    run(scheduler)
    if ticket == "after":
        assert events.first["a"].token_ids == [next_token(prompt)] and not events.done
        scheduler.grant(("a", 0), blocks)
        run(scheduler)
    assert events.first["a"].token_ids == [next_token(prompt)]
    assert sent_tokens(events, "a", length) == prompt
    assert events.done == ["a"]
    assert_released(replica)


def test_blocks_leave_while_later_chunks_are_still_to_be_computed():
    replica, events = fake_replica(), Events()
    scheduler = PrefillScheduler(replica, events)
    scheduler.add(request("a", list(range(2, 34))))
    scheduler.grant(("a", 0), range(8))
    scheduler.tick()
    scheduler.tick()
    scheduler.tick()
    assert events.sent["a"] and "a" not in events.first


def test_prefix_hit_is_reported_and_only_wanted_blocks_are_sent():
    replica, events = fake_replica(), Events()
    scheduler = PrefillScheduler(replica, events)
    prompt = list(range(10, 22))
    for name, wanted in (("a", [0, 1, 2]), ("b", [2])):
        scheduler.add(request(name, prompt))
        scheduler.grant((name, 0), wanted)
        run(scheduler)
    assert events.first["a"].cached_tokens == 0
    assert events.first["b"].cached_tokens == 8  # the last block is computed again: its last logits are needed
    assert list(events.sent["b"]) == [2]
    assert events.first["b"].token_ids == events.first["a"].token_ids
    assert_released(replica)


def test_a_prompt_that_waits_behind_its_prefix_finds_it():
    """Two at once: the second one's turn comes when the blocks of the first are there, if need be a step later."""
    replica, events = fake_replica(prefill_tokens=32), Events()
    scheduler = PrefillScheduler(replica, events)
    shared = list(range(10, 22))
    for name, rest in (("a", [40, 41]), ("b", [50, 51])):
        scheduler.add(request(name, shared + rest))
        scheduler.grant((name, 0), [])
    run(scheduler)
    assert events.first["a"].cached_tokens == 0
    assert events.first["b"].cached_tokens == len(shared)


def test_what_a_waiting_prompt_will_find_is_evicted_last():
    """Room for nearly three prompts of four blocks: the third one read pushes out the one that nobody waits for."""
    replica, events = fake_replica(num_pages=11, max_model_len=32), Events()
    scheduler = PrefillScheduler(replica, events)
    old, other, new = ([start + i for i in range(16)] for start in (10, 40, 70))

    def read(*prompts: list[int]) -> list[int]:
        names = [f"{len(events.first)}-{place}" for place in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            scheduler.add(request(name, prompt))
            scheduler.grant((name, 0), [])
        run(scheduler)
        return [events.first[name].cached_tokens for name in names]

    read(old)
    read(other)
    assert read(new, [*old, 9]) == [0, 16]
    assert_released(replica)


def test_no_block_wanted_still_finishes_with_the_first_token():
    replica, events = fake_replica(), Events()
    scheduler = PrefillScheduler(replica, events)
    scheduler.add(request("a", [9, 8, 7]))
    scheduler.grant(("a", 0), [])
    run(scheduler)
    assert events.done == ["a"] and not events.sent["a"]
    assert_released(replica)


def test_stop_on_the_first_token():
    replica, events = fake_replica(), Events()
    scheduler = PrefillScheduler(replica, events)
    prompt = [9, 8, 7]
    scheduler.add(request("a", prompt, stop_token_ids=(next_token(prompt),)))
    scheduler.grant(("a", 0), [0])
    run(scheduler)
    assert events.first["a"].finish_reason is FinishReason.STOP and events.first["a"].token_ids == []
    assert_released(replica)


def test_cancel_at_any_time_frees_everything():
    for ticks in range(6):
        replica, events = fake_replica(), Events()
        scheduler = PrefillScheduler(replica, events)
        scheduler.add(request("a", list(range(2, 30))))
        scheduler.add(request("b", list(range(40, 60))))
        for _ in range(ticks):
            scheduler.tick()
        scheduler.cancel(("a", 0))
        scheduler.cancel(("a", 0))
        scheduler.grant(("a", 0), [0])
        scheduler.grant(("b", 0), range(5))
        run(scheduler)
        assert events.done == ["b"]
        assert sent_tokens(events, "b", 20) == list(range(40, 60))
        assert_released(replica)


def test_full_pool_queues_and_a_slow_receiver_keeps_pages_on_the_device():
    replica, events = fake_replica(num_pages=8, max_model_len=32, prefix_cache=False), Events()
    scheduler = PrefillScheduler(replica, events)
    scheduler.add(request("a", list(range(2, 26))))
    scheduler.add(request("b", list(range(40, 60))))
    events.writable = False
    scheduler.grant(("a", 0), range(6))
    scheduler.grant(("b", 0), range(5))
    run(scheduler)
    assert not events.sent and scheduler.num_waiting == 1
    events.writable = True
    run(scheduler)
    assert events.done == ["a", "b"]
    assert sent_tokens(events, "b", 20) == list(range(40, 60))
    assert_released(replica)


def test_a_prompt_whose_logits_are_not_finite_fails_alone_and_leaves_no_block():
    replica, events = fake_replica(), Events()
    scheduler = PrefillScheduler(replica, events)
    spoil(replica.engine, 10)
    for name, prompt in (("a", list(range(10, 20))), ("b", list(range(40, 70)))):
        scheduler.add(request(name, prompt))
        scheduler.grant((name, 0), [])
    while not events.failures:
        scheduler.tick()
    assert list(events.failures) == ["a"] and isinstance(events.failures["a"], NotFinite)
    assert not any(len(shard.cache) for shard in replica.memory.shards)
    run(scheduler)
    assert events.done == ["b"] and list(events.first) == ["b"]
    spoil(replica.engine, -1)
    scheduler.add(request("c", list(range(10, 20))))
    scheduler.grant(("c", 0), [])
    run(scheduler)
    assert events.first["c"].token_ids == [next_token(list(range(10, 20)))] and events.first["c"].cached_tokens == 0
    assert_released(replica)
