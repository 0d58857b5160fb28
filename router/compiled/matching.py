"""The lookup of a chain in the index's tables, compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine_core.block_hash import Keys
from engine_core.types import Tier
from router.block_table import BlockTable
from router.compiled.library import Compiled

_WORD = 64


class CompiledMatch:
    """What `BlockIndex` looks up by, of the tables that it was asked about last."""

    def __init__(self, compiled: Compiled) -> None:
        self._match = compiled.match
        self._described: list[object] = []  # what `_index` says
        self._index = np.zeros(0, np.uint64)  # see `Index` in matching.cc
        self._index_at = 0
        self._found = np.zeros((0, 3), np.int64)
        self._found_at = 0

    def depths(self, keys: Keys, tables: Sequence[BlockTable], masks: Mapping[int, int]) -> list[list[int]]:
        """[column, leading blocks of the chain that it has, of these those that are no prediction] of those with any.

        Args:
            keys: `[num_blocks] u64` of the chain from its first block on.
            tables: one or two, of equally many planes: tiers, then predictions.
            masks: columns by word; a mapping that is never changed.
        """
        state: list[object] = [masks]
        for table in tables:
            state += (table, table.version)
        if len(state) != len(self._described) or any(a is not b for a, b in zip(state, self._described, strict=True)):
            self._describe(tables, masks)
            self._described = state
        chain = np.ascontiguousarray(keys, np.uint64)
        count = self._match(chain.ctypes.data, len(chain), self._index_at, self._found_at)
        return self._found[:count].tolist()  # type: ignore[no-any-return]

    def _describe(self, tables: Sequence[BlockTable], masks: Mapping[int, int]) -> None:
        num_words = max(masks, default=-1) + 1
        numbers = [len(tables), num_words, tables[0].num_planes, len(Tier)]
        numbers += [masks.get(word, 0) for word in range(num_words)]
        for table in tables:
            numbers += table.addresses(num_words)
        self._index = np.array(numbers, np.uint64)
        self._index_at = self._index.ctypes.data
        self._found = np.zeros((_WORD * num_words, 3), np.int64)
        self._found_at = self._found.ctypes.data
