"""What a worker counts, with times set by hand; that it reaches gateways is `tests/deploy/monitoring/test_live.py`."""

from __future__ import annotations

import time

import msgspec

from engine_core.device_memory import device_memory
from engine_core.messages import LinkStats, WorkerStats, WorkerToGateway
from engine_core.sequence import Sequence
from engine_core.types import Request, SamplingParams
from engine_core.worker_stats import STAGE_BOUNDS, StatsRecorder, Tally

KEY = ("r", 0)


def recorder() -> StatsRecorder:
    return StatsRecorder(lambda: (3, 4))


def sequence(num_tokens: int = 8) -> Sequence:
    return Sequence.of(Request("r", list(range(num_tokens)), num_tokens, SamplingParams()))


def test_a_tally_counts_upper_ends_into_their_bucket() -> None:
    tally = Tally()
    for seconds in (0.0, STAGE_BOUNDS[0], STAGE_BOUNDS[0] * 1.01, 1e6):
        tally.add(seconds)
    counts = tally.snapshot().counts
    assert (counts[0], counts[1], counts[-1], sum(counts)) == (2, 1, 1, 4)


def test_stages_of_a_sequence_that_is_computed_here() -> None:
    stats, one = recorder(), sequence()
    one.created_at = time.monotonic() - 2
    one.num_cached = 4
    stats.admitted(one)
    one.admitted_at -= 3
    stats.prefilled(one)
    one.decoding_at -= 4
    stats.finished(one)
    seen = stats.snapshot()
    for distribution, seconds in ((seen.queue, 2), (seen.prefill, 3), (seen.decode, 4)):
        assert sum(distribution.counts) == 1 and seconds <= distribution.total_s < seconds + 0.5
    assert sum(seen.transfer.counts) == 0
    assert (seen.query_tokens, seen.hit_tokens) == (8, 4)


def test_a_preempted_sequence_waits_from_its_preemption() -> None:
    stats, one = recorder(), sequence()
    one.created_at = time.monotonic() - 100
    stats.preempted(one)
    stats.admitted(one)
    assert stats.snapshot().queue.total_s < 1


def test_steps_and_their_padding() -> None:
    stats = recorder()
    stats.prefill_step(30, 32)
    stats.decode_step(3, 8)
    stats.decode_step(8, 8)
    seen = stats.snapshot()
    assert (seen.prefill_steps, seen.prefill_tokens, seen.prefill_padding) == (1, 30, 2)
    assert (seen.decode_steps, seen.decode_rows, seen.decode_padding) == (2, 11, 5)


def test_hand_overs_by_link() -> None:
    stats = recorder()
    for key, source in ((KEY, "a:1"), (("s", 0), "a:1"), (("t", 0), "b:2"), (("u", 0), "b:2")):
        stats.hand_over_begins(key, source)
        stats.hand_over_received(key, 100)
    stats.hand_over_ended(KEY, failed=False)
    stats.hand_over_ended(("s", 0), failed=True)
    stats.hand_over_cancelled(("t", 0))
    stats.hand_over_ended(("t", 0), failed=False)  # unknown by now
    stats.hand_over_received(("t", 0), 100)
    seen = stats.snapshot()
    assert seen.links["a:1"] == LinkStats(1, 1, 200, seen.links["a:1"].seconds)
    assert seen.links["b:2"] == LinkStats(0, 0, 200, 0.0)
    assert sum(seen.transfer.counts) == 1


def test_the_longest_delay_is_told_once_and_the_rest_since_the_start() -> None:
    stats = recorder()
    stats.loop_lag_s, stats.busy_s = 0.5, 2.0
    assert (stats.snapshot().loop_lag_s, stats.snapshot().loop_lag_s) == (0.5, 0.0)
    seen = stats.snapshot()
    assert (seen.busy_s, seen.memory_used_bytes, seen.memory_limit_bytes) == (2.0, 3, 4)


def test_it_survives_the_wire() -> None:
    stats = recorder()
    stats.hand_over_begins(KEY, "a:1")
    stats.hand_over_ended(KEY, failed=False)
    message = stats.snapshot()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=WorkerToGateway) == message
    assert isinstance(message, WorkerStats)


class Device:
    def __init__(self, platform: str, stats: dict[str, int] | None) -> None:
        self.platform = platform
        self.memory_stats = lambda: stats


def test_device_memory() -> None:
    chips = [
        Device("tpu", {"bytes_in_use": 5, "bytes_limit": 16}),
        Device("tpu", {"bytes_in_use": 1, "bytes_limit": 16}),
    ]
    assert device_memory(chips) == (6, 32)
    assert device_memory([Device("tpu", None)]) == (0, 0)
    used, limit = device_memory([Device("cpu", None)])
    assert 10 << 20 < used < limit
