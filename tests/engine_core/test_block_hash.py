import time
from hashlib import blake2b

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.block_hash import HASH_BYTES, KEY_BYTES, BlockHasher, block_hashes

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
SHORT = st.binary(max_size=4)


def test_only_full_blocks_are_hashed():
    for length, blocks in [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)]:
        assert len(block_hashes(list(range(length)), 4, b"", b"")) == blocks


def test_hashes_are_stable_across_machines_and_releases():
    first, second = block_hashes(range(8), 4, b"salt", b"model")
    assert len(first) == HASH_BYTES
    assert (first.hex(), second.hex()) == ("f5b868ef41276bd246ef1fec69fe1cac", "8adacc299ca5e13aa5cbdced7718cba6")


@pytest.mark.parametrize("page_size", [1, 4, 5, 16])
def test_every_hash_is_the_cbc_mac_of_its_prefix(page_size):
    tokens = list(range(7, 7 + 3 * page_size))
    prefix = page_size.to_bytes(8, "little") + (4).to_bytes(8, "little")
    key = blake2b(prefix + b"salt" + b"model", digest_size=16, person=b"baton.block.aes").digest()
    content = b""
    for index, block_hash in enumerate(block_hashes(tokens, page_size, b"salt", b"model")):
        block = b"".join(token.to_bytes(4, "little") for token in tokens[index * page_size :][:page_size])
        content += block.ljust(-(-len(block) // 16) * 16, b"\0")
        tag = bytes(16)
        for start in range(0, len(content), 16):  # NIST SP 800-38B without its last-block step
            mixed = bytes(a ^ b for a, b in zip(tag, content[start : start + 16], strict=True))
            tag = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(mixed)
        assert block_hash == tag


def test_keys_are_the_first_halves():
    hasher = BlockHasher(4, b"s", b"n")
    hashes = hasher.extend(None, range(13))
    assert hasher.keys(range(13)).tolist() == [int.from_bytes(h[:KEY_BYTES], "little") for h in hashes]
    assert hasher.keys([1, 2]).tolist() == []


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


@pytest.mark.parametrize("token_id", [2**40, 2**31, -(2**31) - 1])
def test_token_ids_beyond_int32_are_refused(token_id):
    with pytest.raises(OverflowError):
        block_hashes([token_id], 1, b"", b"")
    with pytest.raises(OverflowError):
        block_hashes(np.array([token_id]), 1, b"", b"")


@pytest.mark.parametrize("page_size", [16, 48])
def test_long_prompts_are_hashed_in_pieces(page_size):
    """The chain goes on from one piece to the next, and where pieces end changes nothing."""
    tokens = np.random.default_rng(0).integers(0, 2**31, 30_000).tolist()
    hasher = BlockHasher(page_size, b"s", b"n")
    short = hasher.extend(None, tokens[: 10 * page_size])
    whole = short + hasher.extend(short[-1], tokens[10 * page_size :])
    assert hasher.extend(None, tokens) == whole
    assert hasher.keys(tokens).tolist() == [int.from_bytes(h[:KEY_BYTES], "little") for h in whole]


def test_hashing_8k_tokens_takes_well_under_5_ms():
    tokens = list(range(8192))
    best_s = min(_timed(tokens) for _ in range(10))
    assert best_s < 0.005


def _timed(tokens):
    start = time.perf_counter()
    block_hashes(tokens, 16, b"s", b"n")
    return time.perf_counter() - start
