import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.block_hash import HASH_BYTES, BlockHasher, block_hashes

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
SHORT = st.binary(max_size=4)


def test_only_full_blocks_are_hashed():
    for length, blocks in [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)]:
        assert len(block_hashes(list(range(length)), 4, b"", b"")) == blocks


def test_hashes_are_stable_across_machines_and_releases():
    first, second = block_hashes(range(8), 4, b"salt", b"model")
    assert len(first) == HASH_BYTES
    assert (first.hex(), second.hex()) == ("dad093423abcb23bd9c16d34b7c9c8e4", "b9a1bd03d6d44ddbef8b9e7b38e2ce6d")


@settings(deadline=None)
@given(TOKENS, TOKENS, st.integers(1, 5))
def test_hashes_agree_exactly_on_the_common_prefix(a, b, page_size):
    hashes_a, hashes_b = block_hashes(a, page_size, b"s", b"n"), block_hashes(b, page_size, b"s", b"n")
    for index, (left, right) in enumerate(zip(hashes_a, hashes_b, strict=False), 1):
        assert (left == right) == (a[: index * page_size] == b[: index * page_size])


@settings(deadline=None)
@given(TOKENS.filter(len), st.tuples(SHORT, SHORT), st.tuples(SHORT, SHORT))
def test_salts_and_namespaces_separate(tokens, one, other):
    same = block_hashes(tokens, 1, *one)[0] == block_hashes(tokens, 1, *other)[0]
    assert same == (one == other)


def test_salt_and_namespace_do_not_blur():
    assert block_hashes([1], 1, b"ab", b"c") != block_hashes([1], 1, b"a", b"bc")


@settings(deadline=None)
@given(st.lists(TOKENS, max_size=5), st.integers(1, 5))
def test_growing_equals_hashing_the_whole(parts, page_size):
    hasher = BlockHasher(page_size, b"s", b"n")
    tokens, hashes = [], []
    for part in parts:
        tokens += part
        hasher.grow(hashes, tokens)
        assert hashes == block_hashes(tokens, page_size, b"s", b"n")


def test_extend_continues_a_chain_and_takes_arrays():
    hasher = BlockHasher(2, b"s", b"n")
    whole = hasher.extend(None, np.arange(6, dtype=np.int64))
    assert whole[1:] == hasher.extend(whole[0], [2, 3, 4, 5])
    assert whole[1:] != hasher.extend(None, [2, 3, 4, 5])


def test_token_ids_beyond_int32_are_refused():
    with pytest.raises(OverflowError):
        block_hashes([2**40], 1, b"", b"")


def test_hashing_8k_tokens_takes_well_under_5_ms():
    tokens = list(range(8192))
    best_s = min(_timed(tokens) for _ in range(10))
    assert best_s < 0.005


def _timed(tokens):
    start = time.perf_counter()
    block_hashes(tokens, 16, b"s", b"n")
    return time.perf_counter() - start
