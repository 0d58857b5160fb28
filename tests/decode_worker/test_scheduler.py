"""The overlap scheduler over the fake engine: answers, pages and slots after every kind of end."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest

from decode_worker.scheduler import DecodeScheduler
from engine_core.errors import NotFinite, TransferTimeout
from engine_core.landings import LAND_PAGES
from engine_core.messages import PeerAddress, TokenChunk
from engine_core.types import FinishReason, Numerics, Request, SamplingParams
from tests.fake_engine import fake_replica, generate, next_token, spoil

PREFILL = PeerAddress("127.0.0.1", 1, 2)


class Events:
    def __init__(self) -> None:
        self.chunks: dict[tuple[str, int], list[TokenChunk]] = defaultdict(list)
        self.tickets: list[tuple] = []
        self.failures: dict[tuple[str, int], Exception] = {}

    def reserved(self, key, prefill, wanted) -> None:
        self.tickets.append((key, prefill, wanted))

    def tokens(self, chunks) -> None:
        for chunk in chunks:
            self.chunks[chunk.request_id, chunk.epoch].append(chunk)

    def failed(self, key, error) -> None:
        self.failures[key] = error

    def answer(self, name: str, epoch: int = 0) -> list[int]:
        return [token for chunk in self.chunks[name, epoch] for token in chunk.token_ids]


def request(name: str, prompt: list[int], max_tokens: int, **sampling) -> Request:
    return Request(name, list(prompt), len(prompt), SamplingParams(temperature=0.0, max_tokens=max_tokens, **sampling))


def run(scheduler: DecodeScheduler, limit: int = 1000) -> None:
    idle = 0
    for _ in range(limit):
        idle = 0 if scheduler.tick() else idle + 1
        if idle == 3:
            return
    raise AssertionError("the scheduler does not come to rest")


def waiting_for_blocks(prompt: list[int], max_tokens: int, **options):
    """A request whose prompt a prefill worker reads: its key, and the blocks that it wants."""
    replica, events = fake_replica(**options), Events()
    scheduler = DecodeScheduler(replica, events)
    scheduler.add(request("a", prompt, max_tokens), PREFILL)
    run(scheduler)
    ((key, _, wanted),) = events.tickets
    return replica, events, scheduler, key, wanted


def check_integrity(replica) -> None:
    for shard in replica.memory.shards:
        shard.cache.check_integrity()


def assert_released(replica, scheduler) -> None:
    """Nothing is held but what the prefix cache keeps."""
    assert scheduler.num_running == 0 and scheduler.num_waiting == 0
    for shard in replica.memory.shards:
        pool = shard.cache.pool
        assert shard.num_sequences == 0
        assert shard.table.num_free == shard.table.num_slots
        shard.cache.check_integrity()
        shard.cache.clear()
        assert pool.free_count == pool.num_pages
        pool.check_integrity({})


def land(replica, scheduler, key, wanted, prompt) -> None:
    """Play the prefill worker: the blocks hold the prompt's tokens."""
    size = replica.memory.page_size
    for index, generation in wanted:
        block = np.zeros((1, size, 1, 1), np.float32)
        part = prompt[index * size : (index + 1) * size]
        block[0, : len(part), 0, 0] = part
        scheduler.land(key, [index], [block], [generation])


def first_token(name: str, prompt: list[int], reason: FinishReason | None = None) -> TokenChunk:
    tokens = [] if reason is FinishReason.STOP else [next_token(prompt)]
    return TokenChunk(name, 0, 0, tokens, reason)


@pytest.mark.parametrize("numerics", list(Numerics))
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17])
def test_local_prefill_and_decode(length, overlap, numerics):
    replica, events = fake_replica(numerics=numerics), Events()
    scheduler = DecodeScheduler(replica, events, overlap=overlap)
    prompt = [5 + i for i in range(length)]
    scheduler.add(request("a", prompt, 9), None)
    run(scheduler)
    assert events.answer("a") == generate(prompt, 9)
    assert [c.position for c in events.chunks["a", 0]] == list(range(9))
    assert events.chunks["a", 0][-1].finish_reason is FinishReason.LENGTH
    assert_released(replica, scheduler)


def test_remote_prompt_lands_and_continues_from_position_one():
    replica, events = fake_replica(), Events()
    scheduler = DecodeScheduler(replica, events)
    prompt = list(range(10, 21))
    scheduler.add(request("a", prompt, 6), PREFILL)
    run(scheduler)
    ((key, prefill, wanted),) = events.tickets
    assert prefill == PREFILL and [index for index, _ in wanted] == [0, 1, 2]
    land(replica, scheduler, key, wanted, prompt)
    scheduler.landed(key, first_token("a", prompt))
    run(scheduler)
    assert events.answer("a") == generate(prompt, 6)[1:]
    assert events.chunks["a", 0][0].position == 1
    assert_released(replica, scheduler)


def test_only_blocks_that_are_lacking_are_asked_for():
    replica, events = fake_replica(), Events()
    scheduler = DecodeScheduler(replica, events)
    prompt = list(range(10, 24))
    scheduler.add(request("a", prompt[:9], 1), None)
    run(scheduler)
    scheduler.add(request("b", prompt, 4), PREFILL)
    run(scheduler)
    ((key, _, wanted),) = events.tickets
    assert [index for index, _ in wanted] == [2, 3]
    land(replica, scheduler, key, wanted, prompt)
    scheduler.landed(key, first_token("b", prompt))
    run(scheduler)
    assert events.answer("b") == generate(prompt, 4)[1:]
    assert_released(replica, scheduler)


def test_late_blocks_of_a_cancelled_landing_write_nothing():
    prompt = list(range(10, 22))
    replica, events, scheduler, key, wanted = waiting_for_blocks(
        prompt, 4, num_pages=16, max_model_len=32, prefix_cache=False
    )
    scheduler.cancel(key)
    before = replica.engine.cache.copy()
    land(replica, scheduler, key, wanted, prompt)
    scheduler.landed(key, first_token("a", prompt))
    run(scheduler)
    assert (replica.engine.cache == before).all()
    assert not events.chunks
    assert_released(replica, scheduler)


def test_wrong_generation_is_dropped():
    prompt = list(range(10, 14))
    replica, _, scheduler, key, wanted = waiting_for_blocks(prompt, 4)
    before = replica.engine.cache.copy()
    land(replica, scheduler, key, [(i, g - 1) for i, g in wanted], prompt)
    run(scheduler)
    assert (replica.engine.cache == before).all()


def test_first_token_that_ends_the_answer_frees_the_landing():
    prompt = list(range(10, 21))
    replica, events, scheduler, key, wanted = waiting_for_blocks(prompt, 6)
    land(replica, scheduler, key, wanted, prompt)
    scheduler.landed(key, first_token("a", prompt, FinishReason.STOP))
    run(scheduler)
    assert not events.chunks
    assert_released(replica, scheduler)


def test_failed_hand_over_is_reported_and_frees():
    replica, events = fake_replica(), Events()
    scheduler = DecodeScheduler(replica, events)
    scheduler.add(request("a", list(range(10, 21)), 6), PREFILL)
    run(scheduler)
    scheduler.fail(("a", 0), TransferTimeout("no progress"))
    scheduler.fail(("unknown", 0), TransferTimeout("no progress"))
    assert list(events.failures) == [("a", 0)]
    assert_released(replica, scheduler)


def test_stop_token_ends_without_being_shown():
    replica, events = fake_replica(), Events()
    scheduler = DecodeScheduler(replica, events)
    prompt = [5, 6, 7]
    expected = generate(prompt, 8)
    scheduler.add(request("a", prompt, 8, stop_token_ids=(expected[4],)), None)
    run(scheduler)
    cut = expected.index(expected[4])
    assert events.answer("a") == expected[:cut]
    assert events.chunks["a", 0][-1].finish_reason is FinishReason.STOP
    assert_released(replica, scheduler)


def test_resumed_request_continues_behind_what_was_generated():
    replica, events = fake_replica(), Events()
    scheduler = DecodeScheduler(replica, events)
    prompt = [5, 6, 7, 8, 9]
    expected = generate(prompt, 8)
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    scheduler.add(Request("a", prompt + expected[:3], len(prompt), sampling, epoch=2), None)
    run(scheduler)
    assert events.answer("a", 2) == expected[3:]
    assert events.chunks["a", 2][0].position == 3
    assert_released(replica, scheduler)


@pytest.mark.parametrize("numerics", list(Numerics))
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_full_cache_queues_then_preempts_and_no_answer_changes(prefix_cache, numerics):
    replica = fake_replica(num_pages=9, max_model_len=36, numerics=numerics, prefix_cache=prefix_cache)
    events = Events()
    scheduler = DecodeScheduler(replica, events)
    prompts = {f"r{i}": [3 + i + j for j in range(5 + i % 3)] for i in range(8)}
    for name, prompt in prompts.items():
        scheduler.add(request(name, prompt, 12), None)
    run(scheduler)
    assert scheduler.num_preemptions > 0
    for name, prompt in prompts.items():
        assert events.answer(name) == generate(prompt, 12), name
        assert [c.position for c in events.chunks[name, 0]] == list(range(12))
    assert_released(replica, scheduler)


def test_who_was_preempted_goes_on_although_others_keep_coming():
    """Those whose prompts are read elsewhere would take each page that is freed: his stream would stand still."""
    replica, events = fake_replica(num_pages=20, max_model_len=76, num_slots=8), Events()
    scheduler = DecodeScheduler(replica, events)
    prompts = {name: [start + i for i in range(30)] for name, start in (("a", 3), ("b", 40))}
    for name, prompt in prompts.items():
        scheduler.add(request(name, prompt, 40), None)
    told = 0
    for tick in range(400):
        if len(prompts) - 2 - told < 2:  # two that wait, always
            name, prompt = f"r{tick}", [(7 * tick + i) % 90 + 3 for i in range(14)]
            prompts[name] = prompt
            scheduler.add(request(name, prompt, 10), PREFILL)
        scheduler.tick()
        for key, _, wanted in events.tickets[told:]:
            land(replica, scheduler, key, wanted, prompts[key[0]])
            scheduler.landed(key, first_token(key[0], prompts[key[0]]))
        told = len(events.tickets)
    assert scheduler.num_preemptions > 0 and told > 20
    assert events.answer("a") == generate(prompts["a"], 40)


def test_a_prompt_that_waits_for_pages_is_not_overtaken_by_later_landings():
    replica, events = fake_replica(num_pages=9, max_model_len=36, prefix_cache=False), Events()
    scheduler = DecodeScheduler(replica, events)
    long = list(range(2, 32))
    scheduler.add(request("running", [5, 6, 7, 8, 9], 12), None)
    scheduler.tick()
    scheduler.add(request("long", long, 2), None)
    scheduler.tick()
    scheduler.add(request("short", [5, 6, 7], 2), PREFILL)
    while len(events.answer("running")) < 12:
        assert not events.tickets
        scheduler.tick()
    run(scheduler)
    assert events.answer("long") == generate(long, 2)
    ((key, _, wanted),) = events.tickets
    land(replica, scheduler, key, wanted, [5, 6, 7])
    scheduler.landed(key, first_token("short", [5, 6, 7]))
    run(scheduler)
    assert events.answer("short") == generate([5, 6, 7], 2)[1:]
    assert_released(replica, scheduler)


def test_a_preempted_sequence_is_not_overtaken_by_later_landings():
    replica, events = fake_replica(num_pages=9, max_model_len=36, prefix_cache=False), Events()
    scheduler = DecodeScheduler(replica, events)
    for name in ("older", "younger"):
        scheduler.add(request(name, [5, 6, 7, 8, 9], 24), None)
    while not scheduler.num_preemptions:
        scheduler.tick()
    scheduler.tick()
    scheduler.add(request("short", [5, 6, 7], 2), PREFILL)
    assert replica.memory.free_pages
    while len(events.answer("older")) < 24:
        assert not events.tickets
        scheduler.tick()
    run(scheduler)
    assert events.answer("younger") == generate([5, 6, 7, 8, 9], 24)
    assert len(events.tickets) == 1


def test_a_landing_that_came_before_a_prompt_that_waits_for_pages_goes_first():
    replica, events = fake_replica(num_pages=9, max_model_len=36, prefix_cache=False), Events()
    scheduler = DecodeScheduler(replica, events)
    scheduler.add(request("brief", list(range(2, 18)), 6), None)
    scheduler.add(request("running", [5, 6, 7, 8, 9], 12), None)
    while scheduler.num_running < 2:
        scheduler.tick()
    scheduler.add(request("landing", list(range(3, 19)), 2), PREFILL)
    scheduler.add(request("long", list(range(2, 32)), 2), None)
    while not events.tickets:
        assert len(events.answer("running")) < 12
        scheduler.tick()
    assert len(events.answer("running")) < 12


@pytest.mark.parametrize("patience_s", [0.0, 60.0])
def test_a_landing_that_has_waited_for_long_is_not_overtaken_by_prompts_that_need_fewer_pages(patience_s, monkeypatch):
    monkeypatch.setattr("decode_worker.scheduler.PATIENCE_S", patience_s)
    replica, events = fake_replica(num_pages=9, max_model_len=36, prefix_cache=False), Events()
    scheduler = DecodeScheduler(replica, events)
    scheduler.add(request("running", [5, 6, 7, 8, 9], 12), None)
    scheduler.tick()
    scheduler.add(request("landing", list(range(2, 32)), 2), PREFILL)
    scheduler.tick()
    scheduler.add(request("short", [5, 6, 7], 2), None)
    scheduler.add(request("scored", [5, 6, 7], 2, logprobs=0, prompt_logprobs=True), None)
    overtook = set()
    while not events.tickets:
        overtook |= {name for name in ("short", "scored") if events.answer(name)}
        scheduler.tick()
    assert overtook == ({"short", "scored"} if patience_s else set())
    ((key, _, wanted),) = events.tickets
    land(replica, scheduler, key, wanted, list(range(2, 32)))
    scheduler.landed(key, first_token("landing", list(range(2, 32))))
    run(scheduler)
    assert events.answer("landing") == generate(list(range(2, 32)), 2)[1:]
    assert events.answer("short") == generate([5, 6, 7], 2)
    assert_released(replica, scheduler)


@pytest.mark.parametrize("sent", [True, False])
def test_a_landing_does_not_wait_for_a_prompt_that_was_cancelled_or_that_nothing_makes_room_for(sent):
    replica, events = fake_replica(num_pages=9, max_model_len=36, prefix_cache=False), Events()
    scheduler = DecodeScheduler(replica, events)
    if sent:  # its KV is on the way: it may need what the next landing's prompt holds on the prefill worker
        scheduler.add(request("sent", list(range(2, 18)), 2), PREFILL)
    else:
        scheduler.add(request("running", [5, 6, 7, 8, 9], 12), None)
    scheduler.tick()
    scheduler.add(request("long", list(range(2, 32)), 2), None)
    scheduler.tick()
    scheduler.add(request("short", [5, 6, 7], 2), PREFILL)
    if not sent:
        scheduler.cancel(("long", 0))
    scheduler.tick()
    assert events.tickets[-1][0] == ("short", 0)


def test_a_landing_does_not_wait_for_a_prompt_that_lacks_only_a_slot():
    replica, events = fake_replica(num_pages=64, num_slots=1, max_model_len=36), Events()
    scheduler = DecodeScheduler(replica, events)
    for name in ("running", "next"):
        scheduler.add(request(name, [5, 6, 7, 8, 9], 12), None)
        scheduler.tick()
    scheduler.add(request("short", [5, 6, 7], 2), PREFILL)
    scheduler.tick()
    assert len(events.tickets) == 1


@pytest.mark.parametrize("seed", range(40))
def test_random_traffic_with_cancels_leaves_nothing_behind(seed):
    rng = random.Random(seed)
    shards = 1 + seed % 2
    sizes = {"num_pages": shards * rng.choice([10, 20, 64]), "num_slots": shards * rng.choice([1, 3, 4])}
    replica = fake_replica(max_model_len=40, row_shards=shards, **sizes)
    events = Events()
    scheduler = DecodeScheduler(replica, events)
    shared = [rng.randrange(2, 90) for _ in range(12)]
    prompts, limits, cancelled, tickets = {}, {}, set(), []
    for step in range(200):
        if step < 120 and rng.random() < 0.25:
            name = f"r{step}"
            prompts[name] = shared[: rng.randrange(13)] + [rng.randrange(2, 90) for _ in range(rng.randrange(1, 12))]
            limits[name] = rng.randrange(1, 14)
            scheduler.add(request(name, prompts[name], limits[name]), PREFILL if rng.random() < 0.5 else None)
        if prompts and rng.random() < 0.05:
            name = rng.choice(list(prompts))
            cancelled.add(name)
            scheduler.cancel((name, 0))
        tickets += events.tickets
        events.tickets.clear()
        if tickets and rng.random() < 0.5:
            key, _, wanted = tickets.pop(rng.randrange(len(tickets)))
            prompt = prompts[key[0]]
            land(replica, scheduler, key, wanted, prompt)
            reason = FinishReason.LENGTH if limits[key[0]] == 1 else None
            chunk = first_token(key[0], prompt, reason)
            if key[0] not in cancelled:
                events.chunks[key].append(chunk)
            scheduler.landed(key, chunk)
        scheduler.tick()
        check_integrity(replica)
    while True:
        run(scheduler)
        tickets += events.tickets
        events.tickets.clear()
        if not tickets:
            break
        key, _, wanted = tickets.pop()
        land(replica, scheduler, key, wanted, prompts[key[0]])
        chunk = first_token(key[0], prompts[key[0]], FinishReason.LENGTH if limits[key[0]] == 1 else None)
        if key[0] not in cancelled:
            events.chunks[key].append(chunk)
        scheduler.landed(key, chunk)
    for name, prompt in prompts.items():
        expected = generate(prompt, limits[name])
        answer = events.answer(name)
        assert answer == expected if name not in cancelled else expected[: len(answer)] == answer, name
    assert_released(replica, scheduler)


def test_a_landing_is_spread_over_steps_while_others_run():
    replica, events = fake_replica(num_pages=128, max_model_len=200, prefix_cache=False), Events()
    scheduler = DecodeScheduler(replica, events)
    scheduler.add(request("a", [5, 6, 7], 40), None)
    scheduler.tick()
    prompt = [2 + i % 80 for i in range(4 * (2 * LAND_PAGES + 3))]
    scheduler.add(request("b", prompt, 3), PREFILL)
    scheduler.tick()
    ((key, _, wanted),) = events.tickets
    blocks = np.array(prompt, np.float32).reshape(-1, 4, 1, 1)
    scheduler.land(key, [index for index, _ in wanted], [blocks], [generation for _, generation in wanted])
    scheduler.landed(key, first_token("b", prompt))
    written = []
    scatter = replica.engine.scatter
    replica.engine.scatter = lambda pages, layers: (written.append(len(pages)), scatter(pages, layers))
    for portions in range(1, 4):
        scheduler.tick()
        assert len(written) == portions and written[-1] <= LAND_PAGES
    run(scheduler)
    assert events.answer("a") == generate([5, 6, 7], 40)
    assert events.answer("b") == generate(prompt, 3)[1:]
    assert_released(replica, scheduler)


@pytest.mark.parametrize("numerics", list(Numerics))
@pytest.mark.parametrize("length", [1, 2, 4, 5, 13])
def test_a_prompt_is_scored_in_steps_of_its_own_whatever_is_cached(length, numerics):
    replica, events = fake_replica(numerics=numerics), Events()
    scheduler = DecodeScheduler(replica, events)
    prompt = [5 + i for i in range(length)]
    scheduler.add(request("cached", prompt, 3), None)
    run(scheduler)
    for name in ("a", "b"):
        scheduler.add(request(name, prompt, 5, logprobs=1, prompt_logprobs=True), None)
    scheduler.add(request("plain", prompt, 7, logprobs=1), None)
    run(scheduler)
    for name in ("a", "b"):
        first, *others = events.chunks[name, 0]
        assert [entry.logprob for entry in first.prompt_logprobs] == [-float(token) for token in prompt[1:]]
        assert not any(chunk.prompt_logprobs for chunk in others)
        assert events.answer(name) == generate(prompt, 5)
        assert first.logprobs[0].logprob == -float(generate(prompt, 1)[0])
        assert first.cached_tokens == 0
    assert not any(chunk.prompt_logprobs for chunk in events.chunks["plain", 0])
    assert_released(replica, scheduler)


def test_a_scored_prompt_that_is_cancelled_half_way_holds_nothing():
    replica, events = fake_replica(), Events()
    scheduler = DecodeScheduler(replica, events)
    scheduler.add(request("a", list(range(5, 25)), 5, logprobs=0, prompt_logprobs=True), None)
    scheduler.tick()
    scheduler.tick()
    assert scheduler.queued_tokens > 0
    scheduler.cancel(("a", 0))
    run(scheduler)
    assert events.answer("a") == []
    assert_released(replica, scheduler)


def test_a_stream_that_goes_on_elsewhere_does_not_score_its_prompt_again():
    replica, events = fake_replica(), Events()
    scheduler = DecodeScheduler(replica, events)
    prompt = list(range(5, 12))
    said = generate(prompt, 4)
    sampling = SamplingParams(temperature=0.0, max_tokens=9, logprobs=0, prompt_logprobs=True)
    scheduler.add(Request("a", [*prompt, *said], len(prompt), sampling, epoch=1), None)
    run(scheduler)
    assert said + events.answer("a", 1) == generate(prompt, 9)
    assert not any(chunk.prompt_logprobs for chunk in events.chunks["a", 1])
    assert_released(replica, scheduler)


@pytest.mark.parametrize("ending", ["cancel", "fail"])
@pytest.mark.parametrize("landed", [0, 1, 2, 3])
def test_what_has_landed_is_not_fetched_again(landed, ending):
    """The hand-over breaks off behind some blocks: the next attempt asks for the others only."""
    prompt = list(range(10, 24))
    replica, events, scheduler, key, wanted = waiting_for_blocks(prompt, 6)
    land(replica, scheduler, key, wanted[:landed], prompt)
    if landed % 2:
        run(scheduler)  # written; else it breaks off before
    if ending == "cancel":
        scheduler.cancel(key)
    else:
        scheduler.fail(key, TransferTimeout("prefill died"))
    again = Request("a", prompt, len(prompt), SamplingParams(temperature=0.0, max_tokens=6), epoch=1)
    scheduler.add(again, PREFILL)
    run(scheduler)
    key, _, wanted = events.tickets[1]
    assert [index for index, _ in wanted] == list(range(landed, 4))
    land(replica, scheduler, key, wanted, prompt)
    token = first_token("a", prompt)
    scheduler.landed(key, TokenChunk("a", 1, 0, token.token_ids))
    run(scheduler)
    assert events.answer("a", 1) == generate(prompt, 6)[1:]
    assert_released(replica, scheduler)


def test_only_leading_blocks_are_kept():
    prompt = list(range(10, 24))
    replica, events, scheduler, key, wanted = waiting_for_blocks(prompt, 6)
    land(replica, scheduler, key, [wanted[0], wanted[2]], prompt)
    run(scheduler)
    scheduler.cancel(key)
    scheduler.add(Request("a", prompt, len(prompt), SamplingParams(temperature=0.0, max_tokens=6), epoch=1), PREFILL)
    run(scheduler)
    assert [index for index, _ in events.tickets[1][2]] == [1, 2, 3]
    scheduler.cancel(("a", 1))
    assert_released(replica, scheduler)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("lost", [[0], [1], [3], [1, 2], [0, 1, 2, 3]])
def test_lost_blocks_are_computed_here(lost, prefix_cache):
    prompt = list(range(10, 24))
    replica, events, scheduler, key, wanted = waiting_for_blocks(prompt, 6, prefix_cache=prefix_cache)
    land(replica, scheduler, key, [each for each in wanted if each[0] not in lost], prompt)
    scheduler.landed(key, first_token("a", prompt), lost)
    run(scheduler)
    assert events.answer("a") == generate(prompt, 6)[1:]  # the prefill worker has told the first
    assert [chunk.position for chunk in events.chunks["a", 0]] == [1, 2, 3, 4, 5]
    assert not events.failures
    assert_released(replica, scheduler)


def test_only_what_lies_behind_the_first_lost_block_is_computed_again():
    prompt = list(range(10, 24))
    replica, events, scheduler, key, wanted = waiting_for_blocks(prompt, 6)
    land(replica, scheduler, key, [wanted[0], wanted[1], wanted[3]], prompt)
    scheduler.landed(key, first_token("a", prompt), [2])
    scheduler.tick()
    (sequence,) = scheduler._sequences.values()
    assert sequence.num_cached == 2 * replica.memory.page_size
    run(scheduler)
    assert events.answer("a") == generate(prompt, 6)[1:]
    assert_released(replica, scheduler)


@pytest.mark.parametrize("ending", ["cancel", "stop"])
def test_a_sequence_with_lost_blocks_may_end_before_they_are_computed(ending):
    prompt = list(range(10, 24))
    replica, events, scheduler, key, wanted = waiting_for_blocks(prompt, 6)
    land(replica, scheduler, key, wanted[:2], prompt)
    reason = FinishReason.STOP if ending == "stop" else None
    scheduler.landed(key, first_token("a", prompt, reason), [2, 3])
    if ending == "cancel":
        scheduler._write_arrived()
        assert scheduler.queued_tokens
        scheduler.cancel(key)
    run(scheduler)
    assert not events.chunks and not events.failures
    assert_released(replica, scheduler)


@pytest.mark.parametrize("at", [10, 13])
def test_a_sequence_whose_logits_are_not_finite_fails_alone_and_leaves_no_block(at):
    prompt, other = list(range(10, 20)), list(range(40, 70))
    replica, events = fake_replica(), Events()
    scheduler = DecodeScheduler(replica, events)
    spoil(replica.engine, at)
    scheduler.add(request("a", prompt, 12), None)
    scheduler.add(request("b", other, 12), None)
    while not events.failures:
        scheduler.tick()
    assert not any(len(shard.cache) for shard in replica.memory.shards)
    ((key, error),) = events.failures.items()
    assert key == ("a", 0) and isinstance(error, NotFinite)
    assert events.answer("a") == generate(prompt, 12)[: at - 10], "what came before it"
    run(scheduler)
    assert events.answer("b") == generate(other, 12)
    spoil(replica.engine, -1)
    scheduler.add(request("c", prompt, 12), None)
    run(scheduler)
    assert events.answer("c") == generate(prompt, 12) and events.chunks["c", 0][0].cached_tokens == 0
    assert_released(replica, scheduler)


def test_a_prompt_that_is_scored_by_logits_that_are_not_finite_fails():
    replica, events = fake_replica(), Events()
    scheduler = DecodeScheduler(replica, events)
    spoil(replica.engine, 5)
    scheduler.add(request("a", list(range(10, 20)), 3, prompt_logprobs=True), None)
    run(scheduler)
    assert isinstance(events.failures["a", 0], NotFinite) and not events.answer("a")
    assert_released(replica, scheduler)
