"""What a follower does, and what it refuses, over an engine that only notes its calls."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from engine_core.batch import BatchBuilder
from engine_core.errors import ProtocolError
from engine_core.follower import Follower
from engine_core.host_commands import (
    Export,
    ExportAbort,
    ExportFinish,
    ExportOffer,
    Gather,
    InitSlot,
    KvHeads,
    KvPiece,
    RunStep,
    Scatter,
)
from engine_core.messages import TokenChunk
from engine_core.slot_table import SlotTable
from tests.fake_engine import VOCAB, fake_replica

NUM_PAGES, PAGE, LAYERS, HEAD = 8, 2, 2, 4
EXPORT = Export("r", 0, (4, 5))
FINISH = ExportFinish("r", 0, TokenChunk("r", 0, 0, [1]))


class Pages:
    def __init__(self, layers, ready: bool) -> None:
        self.layers, self.ready = layers, ready

    def is_ready(self) -> bool:
        return self.ready

    def wait(self):
        return self.layers


class Engine:
    """Holds KV heads 1 and 2 of 3, of which it hands over the second."""

    def __init__(self) -> None:
        resolved = fake_replica(num_pages=NUM_PAGES, page_size=PAGE, num_slots=2, max_model_len=8).resolved
        layout = dataclasses.replace(resolved.layout, num_layers=LAYERS, num_kv_heads=3, head_dim=HEAD)
        self.resolved = dataclasses.replace(resolved, layout=layout)
        self.shards = SimpleNamespace(own=KvHeads(1, 2), exported=(KvHeads(2, 1),))
        self.calls: list = []
        self.ready = True

    def dispatch(self, inputs) -> None:
        self.calls.append(inputs)

    def init_slot(self, *arguments) -> None:
        self.calls.append(arguments)

    def gather(self, pages) -> Pages:
        self.calls.append(pages)
        size = len(pages) * PAGE * 4 * HEAD
        shape = (len(pages), PAGE, 4, HEAD)
        return Pages([np.arange(size, dtype=np.float32).reshape(shape) + layer for layer in range(LAYERS)], self.ready)

    def scatter_own(self, pages, layers) -> None:
        self.calls.append((pages, layers))

    def scatter_nothing(self, pages) -> None:
        self.calls.append(("zeros", pages))


class Exports:
    def __init__(self) -> None:
        self.heard: list = []

    def blocks(self, export, layers) -> None:
        self.heard.append((export, [layer.copy() for layer in layers]))

    def tell(self, command) -> None:
        self.heard.append(command)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def exports() -> Exports:
    return Exports()


@pytest.fixture
def bucket():
    return BatchBuilder([SlotTable(2, 4, NUM_PAGES, VOCAB)], place=lambda sampling: sampling).decode((), 2).inputs


@pytest.fixture
def follower(engine, exports, bucket) -> Follower:
    return Follower(engine, [bucket], exports)


def packed(inputs) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(inputs))


def test_a_step_arrives_as_it_was_sent(follower, engine, bucket) -> None:
    sent = dataclasses.replace(bucket, tokens=np.array([3, 4], np.int32), kv_lens=np.array([1, 0], np.int32))
    follower.run(RunStep(2, 2, packed(sent)))
    for got, leaf in zip(jax.tree.leaves(engine.calls[0]), jax.tree.leaves(sent), strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        np.testing.assert_array_equal(got, leaf)


def test_kv_is_put_together_from_its_pieces(follower, engine) -> None:
    size = 4 * PAGE * 4 * HEAD
    content = np.arange(LAYERS * size, dtype=np.float32)
    raw = content.tobytes()
    follower.run(KvPiece(raw[:100]))
    follower.run(KvPiece(raw[100:]))
    follower.run(Scatter((0, 1, 2, 3)))
    pages, layers = engine.calls[0]
    assert pages == (0, 1, 2, 3)
    np.testing.assert_array_equal(np.stack(layers).reshape(-1), content)
    follower.run(Scatter((NUM_PAGES,)))
    assert engine.calls[1] == ("zeros", (NUM_PAGES,))


def test_its_heads_are_handed_over_when_they_are_here_and_before_the_end(follower, engine, exports) -> None:
    follower.run(ExportOffer("r", 0, 9.0))
    engine.ready = False
    follower.run(Gather((6, 7), EXPORT))
    assert follower.tick() and len(exports.heard) == 1
    follower.run(FINISH)
    (export, layers), last = exports.heard[1:]
    assert export == EXPORT and last == FINISH and not follower.tick()
    for i, layer in enumerate(layers):
        whole = np.arange(2 * PAGE * 4 * HEAD, dtype=np.float32).reshape(2, PAGE, 4, HEAD) + i
        np.testing.assert_array_equal(layer, whole[:, :, 2:])


def test_what_was_given_up_is_not_handed_over(follower, engine, exports) -> None:
    engine.ready = False
    follower.run(Gather((6, 7), EXPORT))
    follower.run(ExportAbort("r", 0, "transfer_failed", "gone", True))
    assert not follower.tick() and len(exports.heard) == 1


def test_a_copy_for_nobody_is_dropped(follower, exports) -> None:
    follower.run(Gather((NUM_PAGES,), None))
    assert not follower.tick() and not exports.heard


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (RunStep(4, 4, b""), "is no bucket"),
        (RunStep(2, 2, b"\0" * 10), "have 10 bytes"),
        (InitSlot(2, (), ()), "slot 2"),
        (InitSlot(0, (1,) * 9, ()), "9 and 0 tokens"),
        (Gather((NUM_PAGES + 1,), None), "page ids outside"),
        (Gather((-1,), None), "page ids outside"),
        (Gather((), None), "page ids outside"),
        (Gather((1,), EXPORT), "1 pages for 2 blocks"),
        (Scatter((0, 1)), "2 pages in one write"),
        (KvPiece(b"\0" * (1 << 16)), "more KV than one write takes"),
        ("hello", "str to a follower"),
    ],
)
def test_what_no_leader_says_is_refused(follower, engine, command, message) -> None:
    with pytest.raises(ProtocolError, match=message):
        follower.run(command)
    assert not engine.calls


def test_too_little_kv_is_refused(follower, engine) -> None:
    follower.run(KvPiece(b"\0" * 8))
    with pytest.raises(ProtocolError, match="8 bytes of KV for 1 pages"):
        follower.run(Scatter((0,)))
    assert not engine.calls


def test_a_decode_follower_hands_nothing_over(engine, bucket) -> None:
    with pytest.raises(ProtocolError, match="hands nothing over"):
        Follower(engine, [bucket], None).run(FINISH)
