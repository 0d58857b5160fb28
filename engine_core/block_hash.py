"""Names of blocks: a keyed 128-bit hash of a full block's tokens, chained on its parent's.

Equal hashes mean equal tokens from the sequence's first token on, under the same salt and namespace, on every machine.
Salt and namespace enter the key of BLAKE2b, so chains of different tenants or models never meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

HASH_BYTES = 16

_TOKEN_BYTES = 4
_ROOT_PARENT = bytes(HASH_BYTES)  # as hashed; every parent has one length, so parent and tokens never blur


class BlockHasher:
    """Hashes blocks under one salt and namespace. Stateless after construction: share it freely.

    Args:
        page_size: tokens per block, >= 1.
        salt: separates tenants; derived by the server, any length.
        namespace: separates models and cache layouts (the fingerprint), any length.
    """

    def __init__(self, page_size: int, salt: bytes, namespace: bytes) -> None:
        assert page_size >= 1, page_size
        self.page_size = page_size
        # The length prefix keeps (salt b"ab", namespace b"c") apart from (b"a", b"bc").
        secret = blake2b(len(salt).to_bytes(8, "little"), digest_size=64, person=b"baton.block.key")
        secret.update(salt)
        secret.update(namespace)
        self._keyed = blake2b(key=secret.digest(), digest_size=HASH_BYTES)

    def extend(self, parent: bytes | None, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> list[bytes]:
        """Hash the full blocks of `token_ids`, which follow the block named `parent` (None: start a chain).

        Returns:
            One hash of `HASH_BYTES` per full block, in order; tokens behind the last full block are ignored.

        Raises:
            OverflowError: a token id does not fit int32.
        """
        assert parent is None or len(parent) == HASH_BYTES, parent
        block_bytes = self.page_size * _TOKEN_BYTES
        num_tokens = len(token_ids) // self.page_size * self.page_size
        content = np.array(token_ids[:num_tokens], dtype="<i4").tobytes()
        hashes = []
        if parent is None:
            parent = _ROOT_PARENT
        for start in range(0, len(content), block_bytes):
            keyed = self._keyed.copy()
            keyed.update(parent + content[start : start + block_bytes])
            parent = keyed.digest()
            hashes.append(parent)
        return hashes

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
