"""Names of blocks: keyed 128-bit hashes, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

HASH_BYTES = 16


def block_hashes(
    token_ids: Sequence[int], page_size: int, salt: bytes, namespace: bytes, parent: bytes | None = None
) -> list[bytes]:
    """Hash every full block of `token_ids`, each over its parent's hash and its own tokens.

    Args:
        token_ids: tokens behind `parent`; what does not fill a block is left out.
        page_size: tokens per block.
        salt: of the tenant; blocks of different salts never match.
        namespace: of the model and cache layout.
        parent: hash of the block before the first; None at the start of a sequence.

    Returns:
        16-byte hashes in order.
    """
    key = hashlib.blake2b(len(salt).to_bytes(4, "little") + salt + namespace, digest_size=32).digest()
    count = len(token_ids) // page_size
    raw = np.asarray(token_ids[: count * page_size], "<u4").tobytes()
    step = page_size * 4
    name = parent if parent is not None else bytes(HASH_BYTES)
    names = []
    for at in range(0, count * step, step):
        name = hashlib.blake2b(name + raw[at : at + step], digest_size=HASH_BYTES, key=key).digest()
        names.append(name)
    return names
