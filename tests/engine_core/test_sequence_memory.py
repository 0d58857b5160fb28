"""Which row shard a sequence goes to, that nothing of it leaves that shard, and what others are told of all shards."""

import random

import numpy as np
import pytest

from engine_core.batch import BatchBuilder, Chunk
from engine_core.errors import NoFreePages
from engine_core.prefix_cache import BlocksCleared, BlockStored
from engine_core.sequence import Sequence
from engine_core.sequence_memory import BlockUnion, SequenceMemory, split_memory
from engine_core.types import Request, SamplingParams

PAGE = 4
VOCAB = 97


def memory(num_shards: int = 2, *, num_pages: int = 16, num_slots: int = 8) -> SequenceMemory:
    shards = split_memory(
        num_shards,
        num_pages=num_pages,
        page_size=PAGE,
        num_slots=num_slots,
        pages_per_seq=8,
        vocab_size=VOCAB,
    )
    return SequenceMemory(shards, PAGE, b"test", reuse=True)


def sequence(tokens: list[int], name: str = "s") -> Sequence:
    return Sequence.of(Request(name, tokens, len(tokens), SamplingParams(temperature=0.0, max_tokens=5)))


def placed(held: SequenceMemory, tokens: list[int], *, computes: bool = True) -> Sequence:
    one = sequence(tokens)
    assert held.place(one, computes=computes)
    return one


def test_sequences_spread_and_pages_are_those_of_their_shard():
    held = memory()
    ones = [placed(held, [i] * 6) for i in range(4)]
    assert [one.shard for one in ones] == [0, 1, 0, 1]
    for one in ones:
        assert all(page // 8 == one.shard for page in one.pages)
        row = held.shards[one.shard].table.page_table[one.slot]
        assert row[:2].tolist() == [page - 8 * one.shard for page in one.pages]


def test_a_cached_prefix_draws_a_sequence_until_its_shard_is_crowded():
    """Four slots a shard: one sequence more than on the emptiest is fine, two are not."""
    held = memory(num_pages=64)
    prompt = list(range(9))
    first = placed(held, prompt)
    held.store(first, 9)
    ones = [placed(held, prompt) for _ in range(2)]
    assert [one.shard for one in (first, *ones)] == [0, 0, 1]
    assert [one.num_cached for one in ones] == [8, 0]


def test_where_one_shard_has_no_room_another_is_tried():
    held = memory()
    big = placed(held, list(range(30)))  # all eight pages of shard 0
    assert placed(held, [1, 2, 3]).shard == 1
    assert placed(held, [1, 2, 4]).shard == 1
    assert not held.place(late := sequence(list(range(40, 70))), computes=True)
    assert (late.shard, late.slot, late.pages) == (-1, -1, [])
    held.release(big)
    assert held.place(late, computes=True) and late.shard == 0


def test_slots_are_counted_by_shard_and_landing_needs_none():
    held = memory(num_slots=2, num_pages=64)
    ones = [placed(held, [i]) for i in range(2)]
    assert not held.place(sequence([7]), computes=True)
    landing = placed(held, [7], computes=False)
    assert landing.slot == -1 and not held.has_slot(landing)
    held.release(ones[landing.shard])
    assert held.has_slot(landing)


def test_the_last_block_is_cached_only_for_who_does_not_compute():
    held = memory(1)
    prompt = list(range(8))
    first = placed(held, prompt)
    held.store(first, 8)
    assert placed(held, prompt).num_cached == 4
    assert placed(held, prompt, computes=False).num_cached == 8


def test_growing_takes_pages_of_the_same_shard_only():
    held = memory()
    one, other = placed(held, list(range(28))), placed(held, [1])
    assert (one.shard, other.shard) == (0, 1)
    held.grow(one, 32)
    with pytest.raises(NoFreePages):
        held.grow(one, 33)
    held.grow(other, 32)
    assert other.pages == list(range(8, 16))


def test_generations_are_never_shared_between_shards():
    held = memory()
    ones = [placed(held, [i] * 8) for i in range(4)]
    generations = [held.generation(page) for one in ones for page in one.pages]
    assert len(set(generations)) == len(generations) == 8
    assert 0 not in generations


def test_a_batch_is_its_shards_behind_one_another_in_their_own_numbers():
    held = memory()
    builder = BatchBuilder([shard.table for shard in held.shards])
    ones = [placed(held, [10 + i] * (3 + i)) for i in range(3)]  # on shards 0, 1, 0
    batch = builder.prefill([Chunk(one, 0, len(one.token_ids), is_last=True) for one in ones], 8, 2)
    inputs = batch.inputs
    assert batch.rows == [0, 2, 1]
    assert inputs.tokens.tolist() == [10, 10, 10, 12, 12, 12, 12, 12] + [11] * 4 + [0] * 4
    assert inputs.rows.tolist() == [0, 0, 0, 1, 1, 1, 1, 1] + [0] * 4 + [2] * 4
    assert inputs.kv_lens.tolist() == [3, 5, 4, 0]
    assert inputs.cu_q_lens.tolist() == [0, 3, 8, 0, 4, 4]
    assert inputs.logits_rows.tolist() == [2, 7, 3, 3]
    assert inputs.slots.tolist() == [0, 1, 0, 4]
    assert inputs.page_table[:, 0].tolist() == [0, 1, 0, 8]
    assert np.asarray(inputs.sampling.any_sampled).shape == ()
    for one in ones:
        one.num_dispatched = len(one.token_ids)
    batch = builder.decode(ones[1:], 2)
    assert batch.rows == [2, 0]
    assert batch.inputs.positions.tolist() == [5, 0, 4, 0]
    assert batch.inputs.slots.tolist() == [1, 4, 0, 4]


def test_a_switch_is_on_where_one_shard_needs_it():
    held = memory()
    builder = BatchBuilder([shard.table for shard in held.shards])
    greedy, drawn = sequence([1, 2]), sequence([3, 4])
    drawn.request = Request("d", [3, 4], 2, SamplingParams(temperature=1.0, max_tokens=5))
    for one in (greedy, drawn):
        assert held.place(one, computes=True)
    sampling = builder.decode([greedy, drawn], 1).inputs.sampling
    assert bool(sampling.any_sampled) and not bool(sampling.any_filtered)
    assert np.asarray(sampling.temperature).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("seed", range(10))
def test_folding_the_events_gives_the_union_at_any_time(seed):
    """Few pages, so that blocks are evicted, stored again on another shard, and the history overflows."""
    rng = random.Random(seed)
    held = memory(3, num_pages=18, num_slots=6)
    union = BlockUnion([shard.cache for shard in held.shards])
    told: dict[bytes, bytes | None] = {}
    running: list[Sequence] = []
    for _ in range(300):
        if running and rng.random() < 0.5:
            held.release(running.pop(rng.randrange(len(running))))
        one = sequence([rng.randrange(3)] * PAGE + [rng.randrange(4)] * PAGE + [rng.randrange(9)] * rng.randrange(1, 9))
        if held.place(one, computes=True):
            held.store(one, len(one.token_ids))
            running.append(one)
        if rng.random() < 0.02:
            held.shards[0].cache.clear()
            for other in running:
                other.num_stored = 0 if other.shard == 0 else other.num_stored
        if rng.random() < (0.5 if seed % 2 else 0.005):
            for event in union.drain_events():
                if isinstance(event, BlocksCleared):
                    told.clear()
                elif isinstance(event, BlockStored):
                    assert event.block_hash not in told and (event.parent is None or event.parent in told)
                    told[event.block_hash] = event.parent
                else:
                    assert event.block_hash not in told.values(), "a parent left before its child"
                    del told[event.block_hash]
            present = {block for shard in held.shards for block in shard.cache.hashes()}
            assert told.keys() == present
            assert set(union.hashes()) == present and len(union.hashes()) == len(present)
