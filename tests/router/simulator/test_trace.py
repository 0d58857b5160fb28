import json

import numpy as np
import pytest

from engine_core.errors import ConfigError
from router.simulator.oracle import INFINITE, capacity, hit_ratio, pooled_hits
from router.simulator.synthesis import Shape, synthesize, warp
from router.simulator.trace import read_trace, spread, write_trace
from tests.router.simulator.cases import PROFILE, trace_of

GOOD = {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [4, 9]}


def written(tmp_path, *rows):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_reads_what_it_writes(tmp_path):
    trace = synthesize(Shape(requests=50), 0)
    path = tmp_path / "trace.jsonl"
    write_trace(trace, path)
    again = read_trace(path, 512, 0)
    assert [r.input_tokens for r in again.requests] == [r.input_tokens for r in trace.requests]
    assert [r.output_tokens for r in again.requests] == [r.output_tokens for r in trace.requests]
    assert [r.arrival_s for r in again.requests] == pytest.approx([r.arrival_s for r in trace.requests], abs=1e-3)
    assert pooled_hits(again, INFINITE) == pooled_hits(trace, INFINITE)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"timestamp": "x"}, "timestamp must be"),
        ({"input_length": 0}, "input_length must be"),
        ({"output_length": None}, "output_length must be"),
        ({"hash_ids": [1]}, "hash_ids has 1 ids; an input_length of 700 has 2 blocks"),
        ({"hash_ids": "ab"}, "hash_ids must be"),
        ({"input_length": True}, "input_length must be"),
    ],
)
def test_bad_lines_are_named(tmp_path, change, text):
    with pytest.raises(ConfigError, match=f"trace.jsonl:2: {text}"):
        read_trace(written(tmp_path, GOOD, {**GOOD, **change}), 512, 0)


def test_files_that_hold_no_trace(tmp_path):
    with pytest.raises(ConfigError, match="no requests"):
        read_trace(written(tmp_path), 512, 0)
    with pytest.raises(ConfigError, match="--trace"):
        read_trace(tmp_path / "absent", 512, 0)
    path = tmp_path / "text"
    path.write_text("hello\n")
    with pytest.raises(ConfigError, match="text:1: not JSON"):
        read_trace(path, 512, 0)


def test_ticks_are_spread_in_order_and_within_the_tick():
    ticks = np.repeat([0.0, 3.0, 6.0], 100)
    arrivals = spread(ticks, np.random.default_rng(0))
    assert (np.diff(arrivals) >= 0).all()
    assert (arrivals >= ticks).all()
    assert (arrivals < ticks + 3.0).all()
    assert len(np.unique(arrivals)) == 300


def test_fine_clocks_are_taken_at_their_word():
    arrivals = np.sort(np.random.default_rng(0).random(100))
    assert (spread(arrivals, np.random.default_rng(1)) == arrivals).all()


def test_hits_of_a_pooled_cache_by_hand():
    trace = trace_of((0, [1, 2], 20, 1), (1, [1, 2, 3], 25, 1), (2, [1, 4], 20, 1), (3, [1, 2], 20, 1))
    assert pooled_hits(trace, INFINITE) == [0, 20, 10, 10]  # the last block of a prompt is computed
    assert pooled_hits(trace, 2) == [0, 20, 10, 10]  # 2 leaves for 4, but only 1 counts
    assert pooled_hits(trace, 1) == [0, 10, 10, 10]
    assert hit_ratio(trace, INFINITE) == pytest.approx(40 / 85)


def test_capacity_by_hand():
    """One chunk each of 1 + 1 s; 2 tokens in steps of 1.5 s for four rows."""
    trace = trace_of((0, [1], 10, 2), (1, [2], 10, 2))
    can = capacity(trace, PROFILE, 2, 1)
    assert can.prefill_rps == pytest.approx(1.0)
    assert can.decode_rps == pytest.approx(4 / (2 * 1.5))
    assert can.link_rps == pytest.approx(1.0)  # 10 bytes each at 10 bytes/s
    assert capacity(trace, PROFILE, 0, 1).rps == pytest.approx(1 / (2.0 + 0.75))


def test_synthesis_keeps_its_shape():
    shape = Shape(requests=4000, rate_rps=5.0, turns=4.0, swing=0.0, think_s=10.0, max_input_tokens=10**6)
    trace = synthesize(shape, 1)
    assert len(trace.requests) == 4000
    assert trace.duration_s == pytest.approx(800, rel=0.15)
    assert np.median([r.output_tokens for r in trace.requests]) == pytest.approx(300, rel=0.1)
    assert all(len(r.blocks) == -(-r.input_tokens // 512) for r in trace.requests)
    more = synthesize(Shape(requests=4000, rate_rps=5.0, turns=8.0, think_s=10.0, max_input_tokens=10**6), 1)
    assert hit_ratio(more, INFINITE) > hit_ratio(trace, INFINITE) + 0.05
    again = synthesize(shape, 1)
    assert [r.arrival_s for r in again.requests] == [r.arrival_s for r in trace.requests]


def test_swing_and_warp_move_the_rate():
    trace = synthesize(Shape(requests=4000, rate_rps=4.0, swing=0.8, period_s=500.0, turns=1.0), 0)
    flat = synthesize(Shape(requests=4000, rate_rps=4.0, turns=1.0), 0)
    for swinging in (trace, warp(flat, 0.8, 500.0)):
        phase = np.array([r.arrival_s for r in swinging.requests]) % 500.0
        busy, quiet = ((phase > 125) & (phase < 375)).sum(), ((phase < 125) | (phase > 375)).sum()
        assert busy > 2 * quiet


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"turns": 0.5}, "turns"),
        ({"swing": 2.0}, "swing"),
        ({"rate_rps": 0.0}, "rate_rps"),
        ({"zipf": -1.0}, "zipf"),
        ({"max_input_tokens": 100}, "max_input_tokens"),
    ],
)
def test_shapes_that_cannot_be(change, name):
    with pytest.raises(ConfigError, match=name):
        Shape(**change)
