"""What is timed together, and what is not counted."""

from __future__ import annotations

import pytest

from engine_core.batch import Chunk
from engine_core.messages import StepSums
from engine_core.sequence import Sequence
from engine_core.step_meter import MAX_SAMPLES, WARM_UP_SAMPLES, StepMeter
from engine_core.types import Request, SamplingParams


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.compiles = 0
        self.meter = StepMeter(lambda: self.now, lambda: self.compiles)
        self.sequence = Sequence.of(Request("r", [1] * 100, 100, SamplingParams()))
        for _ in range(WARM_UP_SAMPLES):
            self.step(9.0)
        assert self.meter.drain() == []

    def chunk(self, start: int, count: int) -> list[Chunk]:
        return [Chunk(self.sequence, start, count, is_last=False)]

    def step(self, seconds: float) -> None:
        self.meter.prefill(self.chunk(0, 4))
        self.now += seconds
        self.meter.read()


def test_a_step_lasts_from_the_end_of_the_one_before() -> None:
    world = World()
    meter = world.meter
    meter.prefill(world.chunk(10, 4))
    world.now += 0.01
    world.sequence.num_dispatched = 50
    meter.decode([world.sequence, world.sequence])  # overlapped
    world.now += 0.02
    meter.read()
    world.now += 0.005
    meter.read()
    assert meter.drain() == [
        StepSums(1, 4, 11 + 12 + 13 + 14, 0, 0, 0, pytest.approx(0.03)),
        StepSums(0, 0, 0, 1, 2, 100, pytest.approx(0.005)),
    ]
    assert meter.drain() == []


def test_steps_that_are_not_read_are_timed_with_the_next_that_is() -> None:
    world = World()
    for start in (0, 8):
        world.meter.prefill(world.chunk(start, 8))
        world.now += 0.01
    world.meter.not_read()
    world.now += 0.02
    world.meter.read()
    assert world.meter.drain() == [StepSums(2, 16, sum(range(1, 17)), 0, 0, 0, pytest.approx(0.04))]


def test_compiles_and_floods_are_not_counted() -> None:
    world = World()
    world.meter.prefill(world.chunk(0, 4))
    world.compiles += 1
    world.now += 3.0
    world.meter.read()
    assert world.meter.drain() == []
    for _ in range(2 * MAX_SAMPLES):
        world.step(0.01)
    assert len(world.meter.drain()) == MAX_SAMPLES
