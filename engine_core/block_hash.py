"""Names of blocks: a keyed 128-bit hash of a full block's tokens, chained on its parent's.

Equal hashes mean equal tokens from the sequence's first token on, under the same salt and namespace, on every machine.
Salt and namespace enter the key through BLAKE2b, so chains of different tenants or models never meet.

The hash is CBC-MAC over AES-128: the ciphertext of a chain's tokens holds the tag of every prefix, so one call into
the crypto library names all blocks of a prompt. Whoever knows the key can make collisions (he cannot with a plain
digest), so the salt must be secret: gateways derive it from the run's. Two chains of at most `n` AES blocks
under an unknown key collide with probability about n^2 / 2^128 (Bellare, Pietrzak, Rogaway, CRYPTO 2005).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

HASH_BYTES = 16
KEY_BYTES = 8

_TOKEN_BYTES = 4
_ROOT_PARENT = bytes(HASH_BYTES)
_PIECE = 8192  # tokens
_PACK_PIECE = struct.Struct(f"<{_PIECE}i").pack

Tokens = Sequence[int] | npt.NDArray[np.integer]
Keys = npt.NDArray[np.uint64]
"""Index keys: the first `KEY_BYTES` of block hashes. Enough where a collision costs time and never an answer."""


class BlockHasher:
    """Hashes blocks under one salt and namespace. Stateless after construction: share it freely.

    Args:
        page_size: tokens per block, >= 1.
        salt: separates tenants; derived by the server from its secret, any length.
        namespace: separates models and cache layouts (the fingerprint), any length.

    Attributes:
        page_size: as given.
        secret: the AES key, `[16]` bytes.
    """

    def __init__(self, page_size: int, salt: bytes, namespace: bytes) -> None:
        assert page_size >= 1, page_size
        self.page_size = page_size
        # The lengths keep (salt b"ab", namespace b"c") apart from (b"a", b"bc"), and pages of different sizes.
        prefix = page_size.to_bytes(8, "little") + len(salt).to_bytes(8, "little")
        secret = blake2b(prefix, digest_size=16, person=b"baton.block.aes")
        secret.update(salt)
        secret.update(namespace)
        self.secret = secret.digest()
        self._cipher = algorithms.AES128(self.secret)
        self._padded_bytes = -(-page_size * _TOKEN_BYTES // HASH_BYTES) * HASH_BYTES

    def chain(self, parent: bytes | None, token_ids: Tokens) -> npt.NDArray[np.uint8]:
        """Hash the full blocks of `token_ids`, which follow the block named `parent` (None: start a chain).

        Returns:
            `[num_blocks, HASH_BYTES] u8`, in order; tokens behind the last full block are ignored.

        Raises:
            OverflowError: a token id does not fit int32.
        """
        assert parent is None or len(parent) == HASH_BYTES, parent
        tags = [blocks[:, -HASH_BYTES // KEY_BYTES :] for blocks in self._encrypted(parent, token_ids)]
        return np.ascontiguousarray(np.concatenate(tags)).view(np.uint8)

    def keys(self, token_ids: Tokens) -> Keys:
        """Index keys `[num_blocks] u64` of a chain that starts with `token_ids`. Raises as `chain` does."""
        return np.concatenate([blocks[:, -HASH_BYTES // KEY_BYTES] for blocks in self._encrypted(None, token_ids)])

    def _encrypted(self, parent: bytes | None, token_ids: Tokens) -> Iterator[Keys]:
        """Piece by piece the ciphertext of all full blocks `[num_blocks, padded bytes / 8] u64`; a tag ends each."""
        encryptor = Cipher(self._cipher, modes.CBC(parent or _ROOT_PARENT)).encryptor()
        num_words = self._padded_bytes // KEY_BYTES
        num_tokens = len(token_ids) // self.page_size * self.page_size
        step = max(1, _PIECE // self.page_size) * self.page_size  # small pieces stay in the processor's caches
        for start in range(0, num_tokens or 1, step):
            end = min(start + step, num_tokens)
            content = self._packed(token_ids if end - start == len(token_ids) else token_ids[start:end])
            yield np.frombuffer(encryptor.update(content), "<u8").reshape(-1, num_words)

    def _packed(self, token_ids: Tokens) -> bytes:
        """Whole blocks, each padded."""
        content = _int32_bytes(token_ids)
        padding = self._padded_bytes // _TOKEN_BYTES - self.page_size
        if padding:  # every block has the same length, so that zeros at its end are unambiguous
            blocks = np.frombuffer(content, "<i4").reshape(-1, self.page_size)
            content = np.pad(blocks, ((0, 0), (0, padding))).tobytes()
        return content

    def extend(self, parent: bytes | None, token_ids: Tokens) -> list[bytes]:
        """What `chain` finds, as one `bytes` per block."""
        tags = self.chain(parent, token_ids).tobytes()
        return [tags[start : start + HASH_BYTES] for start in range(0, len(tags), HASH_BYTES)]

    def grow(self, hashes: list[bytes], token_ids: Sequence[int]) -> None:
        """Append to `hashes` those of the blocks that `token_ids`, the whole sequence, has filled since.

        Cost is that of the new blocks alone.
        """
        start = len(hashes) * self.page_size
        if len(token_ids) - start >= self.page_size:
            hashes += self.extend(hashes[-1] if hashes else None, token_ids[start:])


def block_hashes(
    token_ids: Sequence[int], page_size: int, salt: bytes, namespace: bytes, parent: bytes | None = None
) -> list[bytes]:
    """Hash the full blocks of `token_ids`, which follow the block named `parent` (None: start a chain).

    See `BlockHasher`; of its arguments, only a long-lived caller has use for the object itself.
    """
    return BlockHasher(page_size, salt, namespace).extend(parent, token_ids)


def _int32_bytes(token_ids: Tokens) -> bytes:
    """Tokens, little-endian. Packing a list is several times as fast as NumPy."""
    if isinstance(token_ids, np.ndarray):
        limits = np.iinfo(np.int32)
        if len(token_ids) and (np.min(token_ids) < limits.min or np.max(token_ids) > limits.max):
            raise OverflowError("a token id does not fit int32")
        return token_ids.astype("<i4").tobytes()
    try:
        return _PACK_PIECE(*token_ids) if len(token_ids) == _PIECE else struct.pack(f"<{len(token_ids)}i", *token_ids)
    except struct.error as error:
        raise OverflowError(f"a token id does not fit int32: {error}") from None
