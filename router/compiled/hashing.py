"""Index keys of a prompt, compiled: what `BlockHasher.keys` is by definition."""

from __future__ import annotations

import numpy as np

from engine_core.block_hash import BlockHasher, Keys, Tokens
from router.compiled.library import Hash


class CompiledHasher:
    """Hashes as `hasher` does."""

    def __init__(self, hash_tokens: Hash, hasher: BlockHasher) -> None:
        self._hash = hash_tokens
        self._hasher = hasher

    def keys(self, token_ids: Tokens) -> Keys:
        """See `BlockHasher.keys`."""
        if type(token_ids) is not list:
            return self._hasher.keys(token_ids)
        page_size = self._hasher.page_size
        keys = np.empty(len(token_ids) // page_size, np.uint64)
        if self._hash(token_ids, len(keys), page_size, self._hasher.secret, keys.ctypes.data) < len(keys):
            raise OverflowError("a token id does not fit int32")
        return keys
