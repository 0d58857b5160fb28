"""The circuit breaker's states."""

from __future__ import annotations

from router.breaker import FIRST_PAUSE_S, MAX_FAILURES, MAX_PAUSE_S, PROBE_S, Breaker, BreakerState


def opened() -> Breaker:
    breaker = Breaker()
    for _ in range(MAX_FAILURES):
        assert breaker.allows(0.0)
        breaker.failed(0.0)
    return breaker


def test_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker()
    for _ in range(10):
        breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
    assert opened().state is BreakerState.OPEN
    assert not opened().allows(FIRST_PAUSE_S / 2)


def test_one_probe_closes_it() -> None:
    breaker = opened()
    assert breaker.allows(FIRST_PAUSE_S)
    breaker.placed(FIRST_PAUSE_S)
    assert not breaker.allows(FIRST_PAUSE_S + 0.1)
    breaker.succeeded()
    assert breaker.allows(FIRST_PAUSE_S + 0.1)
    assert breaker.state is BreakerState.CLOSED


def test_a_failed_probe_doubles_the_pause_up_to_a_limit() -> None:
    breaker, now, pause_s = opened(), 0.0, FIRST_PAUSE_S
    for _ in range(8):
        assert not breaker.allows(now + 0.99 * pause_s)
        now += pause_s
        assert breaker.allows(now)
        breaker.placed(now)
        breaker.failed(now)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
    assert breaker.num_opened == 9


def test_a_probe_without_verdict_makes_way_for_another() -> None:
    breaker = opened()
    breaker.placed(FIRST_PAUSE_S)
    breaker.abandoned()
    assert breaker.allows(FIRST_PAUSE_S + 0.1)
    breaker.placed(FIRST_PAUSE_S + 0.1)
    assert not breaker.allows(FIRST_PAUSE_S + PROBE_S)
    assert breaker.allows(FIRST_PAUSE_S + PROBE_S + 0.2)
