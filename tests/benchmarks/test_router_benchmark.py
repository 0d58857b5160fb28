"""`baton bench router`: what it prints, and that its rounds are alike."""

from __future__ import annotations

import gc
import json

import pytest

from benchmarks import router


@pytest.fixture(autouse=True)
def _collector():
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()


def test_json_has_what_scripts_read(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--workers", "20", "--blocks", "1000", "--decisions", "16", "--size-blocks", "20000", "--rounds", "2"]
    sizes += ["--compile-cache", ""]
    assert router.main([*sizes, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    for name in ("p50_ms", "p95_ms", "p95_ms_128k", "events_per_s", "bytes_per_block"):
        assert figures[name] > 0
    assert figures["best_p50_ms"] <= figures["p50_ms"]
    assert figures.keys() - {"bytes_per_block", "page_128"} == figures["page_128"].keys()


def test_rounds_make_the_same_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    decide = router.World.decide

    def recorded(world: router.World, tokens: list[int], number: int):
        placement = decide(world, tokens, number)
        rounds[-1].append((tokens[-1], placement.decision.chosen))
        return placement

    monkeypatch.setattr(router.World, "decide", recorded)
    for _ in range(2):
        rounds.append([])
        router._time_decisions(router._build(20, 1000, 128, 3, None), router.SHORT_TOKENS, 60, 3)
    assert rounds[0] == rounds[1]
    assert len(rounds[0]) == 66
