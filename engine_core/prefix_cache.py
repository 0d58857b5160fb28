"""The radix prefix cache: block hash -> page, linked to the parent block, evicted leaf by leaf, least recent first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from engine_core.page_pool import PagePool


class BlockStored(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A block can be had here."""

    block_hash: bytes
    parent: bytes | None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A block is gone."""

    block_hash: bytes


class BlocksCleared(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All blocks are gone."""


CacheEvent = BlockStored | BlockRemoved | BlocksCleared


@dataclass(slots=True, eq=False)
class _Node:
    name: bytes
    page: int
    parent: _Node | None
    num_children: int = 0


class PrefixCache:
    """Holds one reference to the page of every block it knows.

    Only leaves are evicted, so a chain that is found is found whole. Leaves stand in `_leaves`, least recently used
    first; a leaf that somebody else holds is passed over.

    Args:
        pool: where the pages come from.
        page_size: tokens per block.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self._nodes: dict[bytes, _Node] = {}
        self._leaves: OrderedDict[bytes, _Node] = OrderedDict()
        self._events: list[CacheEvent] = []

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could give at most: free, or held by nobody but this cache."""
        return self.pool.free_count + sum(1 for node in self._nodes.values() if self.pool.refcount(node.page) == 1)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Pages of the longest known prefix of `hashes`, each with a reference that the caller releases."""
        nodes = []
        for name in hashes:
            node = self._nodes.get(name)
            if node is None:
                break
            nodes.append(node)
        if nodes:
            self._touch(nodes[-1])
        pages = [node.page for node in nodes]
        self.pool.retain(pages)
        return pages

    def insert(self, hashes: Sequence[bytes], pages: Sequence[int]) -> None:
        """Remember that `pages[i]` holds block `hashes[i]`, from the start of a sequence. A known block keeps its page."""
        parent: _Node | None = None
        for name, page in zip(hashes, pages, strict=True):
            node = self._nodes.get(name)
            if node is None:
                node = self._add(name, page, parent)
            parent = node
        if parent is not None:
            self._touch(parent)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages from the pool, evicting what must go.

        Raises:
            NoFreePages: even with everything evicted there are too few; nothing has changed.
        """
        missing = count - self.pool.free_count
        if missing > 0 and self.num_available >= count:
            self.evict(missing)
        return self.pool.allocate(count)

    def evict(self, count: int) -> int:
        """Forget up to `count` blocks that nobody else holds, least recently used leaves first.

        Returns:
            How many pages became free.
        """
        freed = 0
        while freed < count:
            leaf = next((n for n in self._leaves.values() if self.pool.refcount(n.page) == 1), None)
            if leaf is None:
                break
            self._remove(leaf)
            freed += 1
        return freed

    def clear(self) -> None:
        """Forget everything."""
        self.pool.release([node.page for node in self._nodes.values()])
        self._nodes.clear()
        self._leaves.clear()
        self._events.append(BlocksCleared())

    def drain_events(self) -> list[CacheEvent]:
        """What has changed since the last call, in order."""
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Assert that links, leaves and references agree."""
        children: dict[bytes, int] = {}
        for node in self._nodes.values():
            assert self.pool.refcount(node.page) >= 1, f"page {node.page} of a cached block is free"
            if node.parent is not None:
                assert self._nodes.get(node.parent.name) is node.parent, "a block has lost its parent"
                children[node.parent.name] = children.get(node.parent.name, 0) + 1
        pages = [node.page for node in self._nodes.values()]
        assert len(set(pages)) == len(pages), "two blocks share a page"
        for name, node in self._nodes.items():
            assert node.num_children == children.get(name, 0), "a block has miscounted its children"
            assert (node.num_children == 0) == (name in self._leaves), "leaves are wrong"

    def _add(self, name: bytes, page: int, parent: _Node | None) -> _Node:
        node = _Node(name, page, parent)
        self.pool.retain([page])
        self._nodes[name] = node
        self._leaves[name] = node
        if parent is not None:
            parent.num_children += 1
            self._leaves.pop(parent.name, None)
        self._events.append(BlockStored(name, parent.name if parent else None))
        return node

    def _remove(self, leaf: _Node) -> None:
        del self._nodes[leaf.name]
        del self._leaves[leaf.name]
        self.pool.release([leaf.page])
        self._events.append(BlockRemoved(leaf.name))
        parent = leaf.parent
        if parent is not None:
            parent.num_children -= 1
            if parent.num_children == 0:
                self._leaves[parent.name] = parent
                self._leaves.move_to_end(parent.name, last=False)

    def _touch(self, node: _Node) -> None:
        if node.name in self._leaves:
            self._leaves.move_to_end(node.name)
