"""Checksums of blocks, and where they lie."""

from __future__ import annotations

import numpy as np

from kv_transfer.blocks import (
    HostBlocks,
    named,
    payload_rows,
    strided_bytes,
    strided_rows,
)
from kv_transfer.digester import PlainDigester
from kv_transfer.layout import BlockLayout

KEY = ("r", 0)
SMALL = BlockLayout(num_layers=3, page_size=4, num_kv_heads=2, head_dim=8, dtype="bfloat16")


def some_rows(layout: BlockLayout, n: int) -> list[np.ndarray]:
    return payload_rows(np.random.default_rng(0).integers(0, 256, n * layout.block_bytes, np.uint8), n, layout)


def test_digests_that_were_taken_before_are_used():
    rows, blocks, digester = tuple(some_rows(SMALL, 3)), [(7, 1), (9, 1)], PlainDigester()
    taken = HostBlocks(rows, None, digester.reader(rows).digests(range(3)))
    found = taken.checksums([2, 0], KEY, blocks, digester)
    assert found == HostBlocks(rows, None).checksums([2, 0], KEY, blocks, digester)
    assert found == named(digester.reader(rows).digests([2, 0]), KEY, blocks)
    rows[0][2, 0] ^= 1  # damage behind the copy is found by the receiver
    assert found[0] != named(digester.reader(rows).digests([2]), KEY, blocks[:1])[0]


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
