"""Digests of blocks: in Python, and compiled, which must be the same to the last bit."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.arena import ALIGNMENT
from kv_transfer.blocks import payload_rows
from kv_transfer.compiled import digester as compiled_module
from kv_transfer.compiled.digester import CompiledDigester, build_digester, open_digester
from kv_transfer.digester import SMALL_ROW_BYTES, Digester, PlainDigester
from kv_transfer.layout import BlockLayout
from tests.kv_transfer.test_transport import compiled_library

SMALL = BlockLayout(num_layers=3, page_size=4, num_kv_heads=2, head_dim=8, dtype="bfloat16")
LARGE = BlockLayout(num_layers=3, page_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")


@pytest.fixture(params=["plain", "compiled"])
def digester(request: pytest.FixtureRequest) -> Digester:
    return PlainDigester() if request.param == "plain" else compiled()


def compiled() -> CompiledDigester:
    opened = open_digester(compiled_library())
    if not isinstance(opened, CompiledDigester):
        pytest.skip("no C++ compiler")
    return opened


@pytest.fixture(params=[SMALL, LARGE], ids=["small rows", "large rows"])
def layout(request: pytest.FixtureRequest) -> BlockLayout:
    layout: BlockLayout = request.param
    assert (layout.layer_bytes <= SMALL_ROW_BYTES) == (layout is SMALL)
    return layout


def some_rows(layout: BlockLayout, n: int) -> list[np.ndarray]:
    return payload_rows(np.random.default_rng(0).integers(0, 256, n * layout.block_bytes, np.uint8), n, layout)


def room(num_bytes: int, offset: int) -> np.ndarray:
    """Zeros, `[num_bytes]` u8, `offset` bytes behind an aligned address, 7s on both sides."""
    memory = np.full(num_bytes + 4 * ALIGNMENT, 7, np.uint8)
    start = ALIGNMENT + offset - memory.ctypes.data % ALIGNMENT
    memory[start : start + num_bytes] = 0
    return memory[start : start + num_bytes]


def test_a_digest_is_of_the_block_s_bytes_and_of_nothing_else(digester, layout):
    rows = some_rows(layout, 5)
    found = digester.reader(rows).digests(range(5))
    assert len(set(found)) == 5
    assert digester.reader(rows).digests([3, 1]) == (found[3], found[1])
    alone = [row[2:3] for row in rows]
    assert digester.reader(alone).digests([0]) == (found[2],)


def test_copying_takes_the_same_digests_and_copies(digester, layout):
    rows = some_rows(layout, 5)
    targets = [np.zeros_like(row) for row in rows]
    assert digester.reader(rows).copy(0, targets, streams=False) == digester.reader(rows).digests(range(5))
    for row, target in zip(rows, targets, strict=True):
        np.testing.assert_array_equal(row, target)
    part = [np.zeros_like(row[:2]) for row in rows]
    assert digester.reader(rows).copy(3, part, streams=True) == digester.reader(rows).digests([3, 4])
    for row, target in zip(rows, part, strict=True):
        np.testing.assert_array_equal(row[3:], target)


def test_every_bit_counts_in_every_layer(digester, layout):
    rows = some_rows(layout, 2)
    for layer in range(layout.num_layers):
        for byte in (0, layout.layer_bytes // 2, layout.layer_bytes - 1):
            before = digester.reader(rows).digests(range(2))
            rows[layer][1, byte] ^= 1
            after = digester.reader(rows).digests(range(2))
            assert after[0] == before[0]
            assert after[1] != before[1]


@given(
    num_layers=st.integers(1, 6),
    layer_bytes=st.one_of(st.integers(1, 80).map(lambda stripes: 64 * stripes), st.integers(1, 3000)),
    n=st.integers(1, 5),
    offsets=st.tuples(st.integers(0, 63), st.sampled_from([0, 0, 32, 64, 1, 16])),
    streams=st.booleans(),
    seed=st.integers(0, 3),
)
def test_compiled_ones_are_equal_to_the_last_bit(num_layers, layer_bytes, n, offsets, streams, seed):
    """Whatever the sizes, the distances from layer to layer, and the addresses; and nothing beside the rows changes."""
    rng, fast, plain = np.random.default_rng(seed), compiled(), PlainDigester()
    source = room(num_layers * (n + 2) * layer_bytes, offsets[0])
    source[:] = rng.integers(0, 256, len(source), np.uint8)
    rows = [row[1 : n + 1] for row in source.reshape(num_layers, n + 2, layer_bytes)]  # a part of longer rows
    target = room(num_layers * n * layer_bytes, offsets[1])
    targets = list(target.reshape(num_layers, n, layer_bytes))
    expected = plain.reader(rows).digests(range(n))
    assert fast.reader(rows).digests(range(n)) == expected
    places = rng.integers(0, n, 7).tolist()
    assert fast.reader(rows).digests(places) == tuple(expected[place] for place in places)
    assert fast.reader(rows).copy(0, targets, streams=streams) == expected
    np.testing.assert_array_equal(targets, np.stack(rows))
    around = target.base
    assert around is not None and (around == 7).sum() >= len(around) - len(target)
    at = target.ctypes.data - around.ctypes.data
    assert (around[:at] == 7).all() and (around[at + len(target) :] == 7).all()


def test_an_empty_choice_has_no_digests(digester, layout):
    assert digester.reader(some_rows(layout, 2)).digests([]) == ()


def test_layers_that_lie_unlike_are_taken_as_they_lie(digester):
    rows = list(some_rows(LARGE, 4))
    unlike = [rows[0][::2], *(np.ascontiguousarray(row[::2]) for row in rows[1:])]
    assert digester.reader(unlike).digests([0, 1]) == PlainDigester().reader(rows).digests([0, 2])


def test_blocks_that_are_not_there_are_refused():
    rows = some_rows(LARGE, 2)
    for places in ([2], [0, -1]):
        with pytest.raises(IndexError):
            compiled().reader(rows).digests(places)
    for first in (1, -1):
        with pytest.raises(ValueError, match="other shapes"):
            compiled().reader(rows).copy(first, [np.zeros_like(row) for row in rows], streams=False)


def test_the_interpreter_runs_on_while_bytes_are_read():
    """Else a worker's event loop would stand still for milliseconds with every frame."""
    keeps_lock = 4  # what ctypes calls FUNCFLAG_PYTHONAPI
    assert not compiled()._digest._flags_ & keeps_lock  # type: ignore[attr-defined]


def test_without_a_place_to_keep_it_or_a_compiler_python_does_it(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert build_digester("") is None
    monkeypatch.setattr(compiled_module, "COMPILERS", ("no-such-compiler",))
    assert build_digester(str(tmp_path)) is None
    assert "no C++ compiler for the copying of KV" in caplog.text
    assert isinstance(open_digester(None), PlainDigester)
    (tmp_path / "broken.so").write_bytes(b"no library")
    assert isinstance(open_digester(tmp_path / "broken.so"), PlainDigester)


def test_lines_that_are_written_whole_are_better_past_the_caches():
    processor = Path("/proc/cpuinfo")
    if not processor.exists():
        pytest.skip("no /proc/cpuinfo")
    assert compiled().prefers_streams == ("avx512f" in processor.read_text().split())
    assert not PlainDigester().prefers_streams
