"""Digests and checksums of blocks."""

from __future__ import annotations

import numpy as np
import pytest

from kv_transfer.blocks import (
    SMALL_ROW_BYTES,
    HostBlocks,
    checksums,
    copy_with_digests,
    digests,
    named,
    payload_rows,
    strided_bytes,
    strided_rows,
)
from kv_transfer.layout import BlockLayout

KEY = ("r", 0)
SMALL = BlockLayout(num_layers=3, page_size=4, num_kv_heads=2, head_dim=8, dtype="bfloat16")
LARGE = BlockLayout(num_layers=3, page_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")


@pytest.fixture(params=[SMALL, LARGE], ids=["small rows", "large rows"])
def layout(request: pytest.FixtureRequest) -> BlockLayout:
    layout: BlockLayout = request.param
    assert (layout.layer_bytes <= SMALL_ROW_BYTES) == (layout is SMALL)
    return layout


def some_rows(layout: BlockLayout, n: int) -> list[np.ndarray]:
    return payload_rows(np.random.default_rng(0).integers(0, 256, n * layout.block_bytes, np.uint8), n, layout)


def test_a_digest_is_of_the_block_s_bytes_and_of_nothing_else(layout):
    rows = some_rows(layout, 5)
    found = digests(rows, range(5))
    assert len(set(found)) == 5
    assert digests(rows, [3, 1]) == (found[3], found[1])
    alone = [row[2:3] for row in rows]
    assert digests(alone, [0]) == (found[2],)


def test_copying_takes_the_same_digests_and_copies(layout):
    rows = some_rows(layout, 5)
    targets = [np.zeros_like(row) for row in rows]
    assert copy_with_digests(rows, targets) == digests(rows, range(5))
    for row, target in zip(rows, targets, strict=True):
        np.testing.assert_array_equal(row, target)


def test_every_bit_counts_in_every_layer(layout):
    rows = some_rows(layout, 2)
    for layer in range(layout.num_layers):
        for byte in (0, layout.layer_bytes // 2, layout.layer_bytes - 1):
            before = digests(rows, range(2))
            rows[layer][1, byte] ^= 1
            after = digests(rows, range(2))
            assert after[0] == before[0]
            assert after[1] != before[1]


def test_digests_that_were_taken_before_are_used(layout):
    rows, blocks = tuple(some_rows(layout, 3)), [(7, 1), (9, 1)]
    taken = HostBlocks(rows, None, digests(rows, range(3)))
    assert taken.checksums([2, 0], KEY, blocks) == HostBlocks(rows, None).checksums([2, 0], KEY, blocks)
    assert taken.checksums([2, 0], KEY, blocks) == checksums(rows, [2, 0], KEY, blocks)
    rows[0][2, 0] ^= 1  # damage behind the copy is found by the receiver
    assert taken.checksums([2], KEY, blocks[:1]) != checksums(rows, [2], KEY, blocks[:1])


def test_the_same_bytes_under_another_name_have_another_checksum():
    names = [(KEY, (0, 1)), (KEY, (1, 1)), (KEY, (0, 2)), (("s", 0), (0, 1)), (("r", 1), (0, 1))]
    assert len({named([42], key, [block]) for key, block in names}) == len(names)
    assert named([42], KEY, [(0, 1)]) != named([43], KEY, [(0, 1)])


def test_strided_rows_lie_in_place():
    stride = 2 * SMALL.layer_bytes + 64
    memory = np.zeros(strided_bytes(2, stride, SMALL), np.uint8)
    for number, row in enumerate(strided_rows(memory, 2, stride, SMALL)):
        assert row.shape == (2, SMALL.layer_bytes)
        row[:] = number + 1
        start = number * stride
        assert (memory[start : start + 2 * SMALL.layer_bytes] == number + 1).all()
    assert not memory[2 * SMALL.layer_bytes : stride].any()
