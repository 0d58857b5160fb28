"""What the step promises beyond parity: slots, padding, one compile per bucket, dtypes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine_core.layers.linear import choose_numbers, matmul
from engine_core.layers.rotary import inverse_frequencies, rotate, rotation
from tests.engine_core.paged_runner import NUM_PAGES, NUM_SLOTS, PAGE_SIZE, Chunk, PagedRunner

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def shared_runner(request: pytest.FixtureRequest) -> PagedRunner:
    return PagedRunner(GOLDEN / "qwen3", scan=request.param)


@pytest.fixture
def runner(shared_runner: PagedRunner) -> PagedRunner:
    shared_runner.reset()
    return shared_runner


def last_tokens(runner: PagedRunner) -> list[int]:
    return np.asarray(runner.slots.last_tokens).tolist()


def test_drawn_tokens_land_in_their_slots_and_nowhere_else(runner: PagedRunner) -> None:
    drawn = runner.run([Chunk([0], 0, [1, 2], slot=3), Chunk([1], 0, [3, 4, 5])], 8, 3)
    assert last_tokens(runner) == [0, 0, 0, drawn[0], 0]
    assert NUM_SLOTS == 5


def test_slots_feed_the_tokens_of_the_next_step(runner: PagedRunner) -> None:
    drawn = runner.run([Chunk([0, 1], 0, [1, 2, 3, 4], slot=1)], 8, 2)
    told = runner.run([Chunk([2, 3], 0, [1, 2, 3, 4]), Chunk([0, 1], 4, [0], token_slot=1, slot=1)], 8, 2)
    expected = runner.run([Chunk([2, 3], 4, [drawn[0]], slot=0)], 8, 2)
    assert told[1] == expected[0] == last_tokens(runner)[1]


def test_padding_writes_nothing(runner: PagedRunner) -> None:
    before = [np.asarray(array) for array in runner.cache.layers]
    runner.run([], 8, 3)
    runner.run([], 4, 4)
    for old, new in zip(before, runner.cache.layers, strict=True):
        np.testing.assert_array_equal(old, new)
    assert last_tokens(runner) == [0] * NUM_SLOTS


def test_a_step_writes_only_its_own_places(runner: PagedRunner) -> None:
    before = [np.asarray(array) for array in runner.cache.layers]
    runner.run([Chunk([5, 2], 0, [7, 8, 9, 10, 11]), Chunk([9], 1, [6])], 8, 2)
    for old, new in zip(before, runner.cache.layers, strict=True):
        changed = (old != np.asarray(new)).any(axis=(-3, -2, -1)).reshape(-1, NUM_PAGES, PAGE_SIZE)
        for layer in changed:
            assert np.argwhere(layer).tolist() == [[2, 0], [5, 0], [5, 1], [5, 2], [5, 3], [9, 1]]


def test_data_never_compiles_again(runner: PagedRunner) -> None:
    before = runner.step._cache_size()
    for length in (1, 3, 6):
        runner.run([Chunk([4, 9], 0, list(range(length)), slot=length % NUM_SLOTS)], 7, 2)
        runner.run([Chunk([4, 9], length, [0], token_slot=length % NUM_SLOTS)], 2, 2)
    assert runner.step._cache_size() == before + 2


def test_bfloat16_stays_near_float32() -> None:
    chunk = Chunk([0, 1, 2], 0, [3, 1, 4, 1, 5, 9, 2, 6, 5])
    exact = PagedRunner(GOLDEN / "llama", scan=False).logits([chunk], 16, 1)[:9]
    rounded = PagedRunner(GOLDEN / "llama", scan=False, dtype="bfloat16").logits([chunk], 16, 1)[:9]
    assert 0 < np.abs(exact - rounded).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_matmul_pads_few_rows_without_a_trace(rows: int) -> None:
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, 8)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((6, 8)), jnp.bfloat16)
    y = jax.jit(matmul, static_argnums=2)(x, weight, choose_numbers("bfloat16", "cpu"))
    wanted = np.asarray(x.astype(jnp.bfloat16), np.float32) @ np.asarray(weight, np.float32).T
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


def test_rotation_depends_on_distance_alone() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 16)), jnp.float32) for _ in range(2))
    frequencies = inverse_frequencies(16, 10000.0, None)

    def score(at_q: int, at_k: int) -> float:
        rotated = [rotate(x, *rotation(jnp.array([at], jnp.int32), frequencies)) for x, at in ((q, at_q), (k, at_k))]
        return float(jnp.vdot(*rotated))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-2)
