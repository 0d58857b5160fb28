"""Linear models against times whose law is known."""

from __future__ import annotations

import cProfile

import numpy as np
import pytest
import scipy.optimize

from engine_core.messages import StepSums
from router.cost_model import _TRANSFER_LEAST, Average, LinearModel, StepModel, TransferModel, _non_negative, fade


def steps(rng: np.random.Generator, count: int, law: tuple[float, ...], noise: float) -> list[StepSums]:
    samples = []
    for _ in range(count):
        tokens, start, rows = int(rng.integers(1, 2048)), int(rng.integers(0, 8192)), int(rng.integers(1, 64))
        prefill = (1, tokens, tokens * start + tokens * (tokens + 1) // 2) if rng.random() < 0.5 else (0, 0, 0)
        decode = (1, rows, rows * int(rng.integers(100, 4000))) if rng.random() < 0.5 or not prefill[0] else (0, 0, 0)
        features = (*prefill, *decode)
        seconds = sum(a * b for a, b in zip(law, features, strict=True)) * float(rng.lognormal(0, noise))
        samples.append(StepSums(*features, seconds))
    return samples


@pytest.mark.parametrize("seed", range(5))
def test_learns_the_law_of_a_worker(seed: int) -> None:
    rng = np.random.default_rng(seed)
    law = (3e-3, 4e-5, 3e-9, 6e-3, 2e-4, 2e-7)
    model = StepModel(None)
    for _ in range(10):
        model.learn(steps(rng, 40, law, noise=0.05), 0.0)
    chunked_s = 2 * law[0] + 4000 * law[1] + (4000 * 1000 + 4000 * 4001 / 2) * law[2]
    assert model.prefill_s(4000, 1000, 2048) == pytest.approx(chunked_s, rel=0.1)
    assert model.decode_s(32, 32 * 1500) == pytest.approx(law[3] + 32 * law[4] + 32 * 1500 * law[5], rel=0.1)


def test_follows_a_change_and_shrugs_at_a_hiccup() -> None:
    model = LinearModel((0.01,), (1.0,))
    model.learn([(1.0,)] * 100, [0.01] * 100)
    model.learn([(1.0,)], [5.0])
    assert model.coefficients[0] == pytest.approx(0.01, rel=0.1)
    for _ in range(40):
        model.learn([(1.0,)] * 32, [0.05] * 32)
    assert model.coefficients[0] == pytest.approx(0.05, rel=0.05)


def test_what_was_never_seen_keeps_its_prior_and_new_workers_ask_a_teacher() -> None:
    model = StepModel(None)
    before = model.coefficients
    model.learn([StepSums(1, 100, 5050, 0, 0, 0, 0.02)] * 50, 0.0)
    assert model.coefficients[3:] == pytest.approx(before[3:], rel=1e-6)
    assert model.prefill_s(100, 0, 512) == pytest.approx(0.02, rel=0.05)
    assert StepModel(model).coefficients == model.coefficients
    assert model.is_trusted


@pytest.mark.parametrize("seed", range(20))
def test_coefficients_are_never_negative(seed: int) -> None:
    """Dropping negatives is not always the best non-negative fit, but nearly: against scipy's NNLS."""
    rng = np.random.default_rng(seed)
    rows = rng.random((60, 4))
    times = rows @ rng.normal(0.5, 0.6, 4).clip(-0.2) + 0.05 * rng.random(60)
    found = _non_negative(rows.T @ rows, rows.T @ times)
    best, residual = scipy.optimize.nnls(rows, times)
    assert (found >= 0).all()
    assert np.linalg.norm(rows @ found - times) <= 1.1 * residual + 1e-9
    assert found == pytest.approx(best, abs=0.15)


def test_links_are_told_apart_and_unknown_ones_are_average() -> None:
    model = TransferModel()
    names = [f"w{i}" for i in range(30)]
    for size in (1_000_000, 4_000_000) * 20:
        model.learn("w0", "w1", size, 0.001 + size / 1e9)
        model.learn("w2", "w29", size, 0.002 + size / 1e8)
    model.fit(0.0)
    fixed_s, byte_s = model.links(names, names)
    assert model.link("w0", "w1") == (fixed_s[0, 1], byte_s[0, 1])
    assert model.link("w5", "w6") == (fixed_s[5, 6], byte_s[5, 6])
    assert fixed_s[0, 1] + 2e6 * byte_s[0, 1] == pytest.approx(0.003, rel=0.05)
    assert fixed_s[2, 29] + 2e6 * byte_s[2, 29] == pytest.approx(0.022, rel=0.05)
    assert 0.003 < fixed_s[5, 6] + 2e6 * byte_s[5, 6] < 0.022
    model.forget("w2")
    fixed_s, byte_s = model.links(names, names)
    assert byte_s[2, 29] == byte_s[5, 6]


def test_the_first_hand_over_of_a_pair_is_not_counted() -> None:
    model = TransferModel()
    model.learn("w0", "w1", 1_000_000, 9.0)
    model.fit(0.0)
    before = model.link("w0", "w1")
    assert before == model.link("w0", "w2")
    for _ in range(40):
        model.learn("w0", "w1", 1_000_000, 0.004)
    model.fit(0.0)
    fixed_s, byte_s = model.link("w0", "w1")
    assert fixed_s + 1e6 * byte_s == pytest.approx(0.004, rel=0.05)


def test_small_hand_overs_that_waited_say_nothing_of_large_ones() -> None:
    """Those of one size came one at a time, those of the other together with others: their bytes are not to blame."""
    model = TransferModel()
    rng = np.random.default_rng(1)
    for _ in range(60):
        model.learn("w0", "w1", 8_192, 0.005 * float(rng.lognormal(0, 0.3)))
        model.learn("w0", "w1", 32_137, 0.02 * float(rng.lognormal(0, 0.6)))
    model.fit(0.0)
    fixed_s, byte_s = model.link("w0", "w1")
    assert 0.004 < fixed_s < 0.02
    assert 400_000 * byte_s < 0.005
    for _ in range(5):  # a slow link shows as soon as hand-overs are large
        model.learn("w0", "w1", 20_000_000, 0.4)
    model.fit(1.0)
    fixed_s, byte_s = model.link("w0", "w1")
    assert fixed_s + 20_000_000 * byte_s == pytest.approx(0.4, rel=0.1)


def test_an_idle_link_comes_to_be_taken_for_an_average_one() -> None:
    model = TransferModel()
    for _ in range(40):
        model.learn("w0", "w1", 1_000_000, 0.004)
        model.learn("w0", "w2", 1_000_000, 0.4)
    model.fit(0.0)

    def seconds(target: str) -> float:
        fixed_s, byte_s = model.link("w0", target)
        return fixed_s + 1e6 * byte_s

    slow = seconds("w2")
    assert slow == pytest.approx(0.4, rel=0.1)
    now = 0.0
    for _ in range(20):
        now += 1.0
        for _ in range(40):
            model.learn("w0", "w1", 1_000_000, 0.004)
        model.fit(now)
    assert seconds("w1") == pytest.approx(0.004, rel=0.1)
    assert seconds("w2") < slow / 4
    fixed_s, byte_s = model.links(["w0"], ["w1", "w2"])
    assert (fixed_s[0, 1], byte_s[0, 1]) == model.link("w0", "w2")


def test_an_idle_worker_comes_to_be_taken_for_what_its_peers_are() -> None:
    busy, idle, new = StepModel(None), StepModel(None), StepModel(None)
    idle.learn([StepSums(1, 100, 5050, 0, 0, 0, 0.5)] * 20, 0.0)
    busy.learn([StepSums(1, 100, 5050, 0, 0, 0, 0.02)] * 20, 0.0)
    fade([busy, idle, new], 0.0)
    assert idle.prefill_s(100, 0, 512) == pytest.approx(0.5, rel=0.05)
    for now in range(1, 90):
        busy.learn([StepSums(1, 100, 5050, 0, 0, 0, 0.02)], float(now))
        fade([busy, idle, new], float(now))
    assert idle.prefill_s(100, 0, 512) == pytest.approx(0.02, rel=0.1)
    assert new.prefill_s(100, 0, 512) == pytest.approx(0.02, rel=0.1)
    idle.learn([StepSums(1, 100, 5050, 0, 0, 0, 0.5)], 90.0)
    fade([busy, idle, new], 90.0)
    assert idle.prefill_s(100, 0, 512) > 0.2, "what it measures itself counts more than what others do"
    fade([busy, idle, new], 1e6)  # nobody knows any more: nothing changes
    assert idle.prefill_s(100, 0, 512) > 0.2


def test_average_follows() -> None:
    average = Average(64.0, 16)
    for _ in range(100):
        average.add(10.0)
    assert average.value == pytest.approx(10.0, abs=0.5)


@pytest.mark.parametrize("seed", range(20))
def test_links_fitted_at_once_are_what_each_would_be_alone(seed: int) -> None:
    """Against one `LinearModel` per link; some laws would have negative coefficients."""
    rng = np.random.default_rng(seed)
    model, alone = TransferModel(), {}
    pairs = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "z")]
    laws = {pair: rng.normal((0.003, 1e-9), (0.003, 2e-9)) for pair in pairs}
    for pair in pairs:
        model.learn(*pair, 0, 9.9)  # connects
    for now in range(1, 6):
        batch = {pair: [] for pair in pairs}
        for _ in range(rng.integers(1, 40)):
            pair, size = pairs[rng.integers(len(pairs))], int(rng.integers(0, 1 << 24))
            seconds = abs(float(laws[pair] @ (1, size))) + 1e-4
            model.learn(*pair, size, seconds)
            batch[pair].append((size, seconds))
        model.fit(float(now))
        prior = model.link("nobody", "knows")
        for pair, samples in batch.items():
            if samples:
                one = alone.setdefault(pair, LinearModel(prior, (1.0, 1e7), _TRANSFER_LEAST))
                one._prior = np.array(prior) * (1.0, 1e7)
                one.learn([(1.0, size) for size, _ in samples], [seconds for _, seconds in samples])
                assert model.link(*pair) == pytest.approx(one.coefficients, rel=1e-6, abs=1e-15)


def test_a_fit_costs_the_same_however_many_links_are_known() -> None:
    """No loop over links: nothing that Python sees depends on their number."""
    calls = []
    for count in (4, 24):
        model = TransferModel()
        for source in range(count):
            for target in range(count):
                for size in (0, 1000, 100_000):
                    model.learn(f"p{source}", f"d{target}", size, 0.001)
        model.fit(0.0)
        model.learn("p0", "d0", 1000, 0.001)
        profile = cProfile.Profile()
        profile.runcall(model.fit, 1.0)
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert calls[0] == calls[1]
