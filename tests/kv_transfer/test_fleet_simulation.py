"""Gateway, prefill, decode and index through hundreds of histories; and that each guard is needed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from engine_core.messages import TokenChunk
from kv_transfer import handoff
from kv_transfer.handoff import ReceiverCore, SenderCore
from router.journal import Journal
from tests.kv_transfer.fleet_simulation import Fleet
from tests.kv_transfer.simulation import Broken

SEEDS = range(1000)


def first_broken(seeds: range, **parts: Any) -> str:
    for seed in seeds:
        try:
            Fleet(seed, **parts).run()
        except Broken as error:
            return f"seed {seed}: {error}"
    return ""


def test_hundreds_of_histories():
    assert first_broken(SEEDS) == ""


def test_without_the_epoch_check_a_stream_takes_tokens_of_another_attempt():
    class AnyEpoch(Journal):
        __slots__ = ()

        def accept(self, chunk: TokenChunk) -> bool:
            return super().accept(msgspec.structs.replace(chunk, epoch=self.epoch))

    assert "another attempt" in first_broken(SEEDS, journal=AnyEpoch)


def test_without_the_fence_a_late_block_lands(monkeypatch):
    monkeypatch.setattr(handoff, "_fits", lambda entry, frame: set(frame.blocks) <= set(entry.missing))
    assert "page" in first_broken(SEEDS)


def test_without_tombstones_work_starts_that_was_cancelled():
    class Forgetful(OrderedDict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            pass

    class Sender(SenderCore):
        def __init__(self) -> None:
            super().__init__()
            self._tombstones = Forgetful()

    assert first_broken(SEEDS, sender=Sender, receiver=ReceiverCore) != ""
