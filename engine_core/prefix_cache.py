"""Block hash -> page: prefixes of earlier sequences, kept until their pages are needed.

The blocks form a forest, each linked to its parent; a block is cached only while its parent is, so a lookup stops at
the first miss. A block is *pinned* while it or a descendant has a holder besides the cache; the unpinned ones are the
evictable ones, ordered by the time they were unpinned, oldest first. Unpinning goes from child to parent, so a child
always precedes its parent in that order, and the first evictable block is always a leaf: eviction never searches.

Owned by the pool's thread. Every operation is O(1) per block it is given or frees, amortized.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from engine_core.errors import NoFreePages
from engine_core.page_pool import PagePool


class BlockStored(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A block entered the cache, behind its parent (None: the first of a chain)."""

    block_hash: bytes
    parent: bytes | None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A block left the cache; its children left before."""

    block_hash: bytes


class BlocksCleared(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All blocks left the cache."""


BlockEvent = BlockStored | BlockRemoved | BlocksCleared


class _Node:
    """One cached block."""

    __slots__ = ("block_hash", "num_children", "page", "parent", "pins")

    def __init__(self, block_hash: bytes, page: int, parent: _Node | None) -> None:
        self.block_hash = block_hash
        self.page = page
        self.parent = parent
        self.num_children = 0
        self.pins = 0  # pinned children, plus one if the page has a holder besides the cache


class PrefixCache:
    """Holds one reference of its own on each cached page.

    Args:
        pool: where the pages live; the cache becomes its listener.
        page_size: tokens per page.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.page_size = page_size
        self.pool = pool
        self._nodes: dict[bytes, _Node] = {}  # insertion order: parents before children
        self._by_page: dict[int, _Node] = {}
        self._evictable: OrderedDict[int, _Node] = OrderedDict()  # page -> unpinned node, least recently used first
        self._events: list[BlockEvent] = []
        self._max_events = 4 * pool.num_pages + 64
        pool.listen(self)

    def __len__(self) -> int:
        """Cached blocks."""
        return len(self._nodes)

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` can free now."""
        return len(self._evictable)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give now: free and evictable ones."""
        return self.pool.free_count + len(self._evictable)

    def pages(self) -> list[int]:
        """Pages on which the cache holds its reference."""
        return list(self._by_page)

    def hashes(self) -> list[bytes]:
        """Hashes of all cached blocks, parents before children."""
        return list(self._nodes)

    def stored(self) -> list[BlockStored]:
        """The events that would give the present blocks to one who knows of none."""
        return [
            BlockStored(node.block_hash, node.parent.block_hash if node.parent else None)
            for node in self._nodes.values()
        ]

    def count(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks of a chain that are cached; nobody holds them for it."""
        return next((i for i, block_hash in enumerate(hashes) if block_hash not in self._nodes), len(hashes))

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Find the pages of the longest cached prefix of a chain of block hashes.

        Returns:
            One page per leading block found, retained for the caller, who releases them to the pool.
        """
        pages = []
        parent = None
        for block_hash in hashes:
            node = self._nodes.get(block_hash)
            if node is None:
                break
            assert node.parent is parent, "the hashes are not one chain"
            pages.append(node.page)
            parent = node
        self.pool.retain(pages)
        return pages

    def touch(self, hashes: Sequence[bytes]) -> None:
        """Somebody waits for this prefix: what is cached of it shall be the last to be evicted."""
        self.pool.release(self.match(hashes))

    def insert(self, hashes: Sequence[bytes], pages: Sequence[int], start: int = 0) -> list[int]:
        """Cache a chain of computed blocks. The caller holds `pages`, and goes on holding them.

        Args:
            hashes: block hashes from the first block of the sequence on.
            pages: one per hash, each fully written.
            start: blocks before it were inserted by an earlier call and need no look (they may be gone all the same).

        Returns:
            The page the cache serves for each of `hashes[start:]`: the caller's, or an older one of the same block,
            which stays. A caller may retain the older ones in place of its own.
        """
        assert len(hashes) == len(pages), f"{len(hashes)} hashes for {len(pages)} pages"
        assert 0 <= start <= len(hashes), start
        first = start
        while first and hashes[first - 1] not in self._nodes:
            first -= 1
        parent = self._nodes[hashes[first - 1]] if first else None
        for block_hash, page in zip(hashes[first:], pages[first:], strict=True):
            node = self._nodes.get(block_hash)
            if node is None:
                node = self._add(block_hash, page, parent)
            assert node.parent is parent, "the hashes are not one chain"
            parent = node
        return [self._nodes[block_hash].page for block_hash in hashes[start:]]

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages from the pool, evicting what is missing.

        Raises:
            NoFreePages: free and evictable pages together are fewer; nothing has changed.
        """
        missing = count - self.pool.free_count
        if missing > len(self._evictable):
            raise NoFreePages(
                f"{count} pages needed, {self.pool.free_count} of {self.pool.num_pages} are free "
                f"and {len(self._evictable)} evictable"
            )
        if missing > 0:
            self.evict(missing)
        return self.pool.allocate(count)

    def evict(self, count: int) -> int:
        """Free up to `count` pages, least recently used leaves first, never one that somebody else holds.

        Returns:
            Pages freed.
        """
        freed: list[int] = []
        while len(freed) < count and self._evictable:
            page, node = self._evictable.popitem(last=False)
            assert node.num_children == 0, "a parent is evicted before its child"
            del self._by_page[page]
            del self._nodes[node.block_hash]
            if node.parent is not None:
                node.parent.num_children -= 1
            self._record(BlockRemoved(node.block_hash))
            freed.append(page)
        self.pool.release(freed)
        return len(freed)

    def clear(self) -> None:
        """Forget every block. Pages that somebody holds stay theirs, uncached."""
        pages = list(self._by_page)
        self._nodes.clear()
        self._by_page.clear()
        self._evictable.clear()
        self._events = [BlocksCleared()]
        self.pool.release(pages)

    def drain_events(self) -> list[BlockEvent]:
        """Take the events since the last call, in order. Folding all of them gives the cached blocks.

        A reader that stays away gets one BlocksCleared and the present blocks instead of the whole history.
        """
        events, self._events = self._events, []
        return events

    def pages_shared(self, pages: Sequence[int]) -> None:
        """From the pool: somebody besides the cache holds these, which are no longer evictable."""
        for page in pages:
            node = self._by_page.get(page)
            if node is not None:
                self._pin(node)

    def pages_unshared(self, pages: Sequence[int]) -> None:
        """From the pool: one holder is left. Where that is the cache, the block may become evictable."""
        for page in pages:
            node: _Node | None = self._by_page.get(page)
            while node is not None:
                node.pins -= 1
                if node.pins:
                    break
                self._evictable[node.page] = node
                node = node.parent

    def check_integrity(self) -> None:
        """Raise AssertionError unless links, pins, order of eviction and refcounts agree."""
        assert {node.page: node for node in self._nodes.values()} == self._by_page, "pages and blocks differ"
        children: dict[bytes, list[_Node]] = {block_hash: [] for block_hash in self._nodes}
        for block_hash, node in self._nodes.items():
            assert node.block_hash == block_hash
            if node.parent is not None:
                assert self._nodes.get(node.parent.block_hash) is node.parent, "a block outlived its parent"
                children[node.parent.block_hash].append(node)
        for block_hash, node in self._nodes.items():
            refcount = self.pool.refcount(node.page)
            assert refcount >= 1, f"page {node.page} is cached but free"
            assert node.num_children == len(children[block_hash]), "children are miscounted"
            pins = (refcount > 1) + sum(child.pins > 0 for child in children[block_hash])
            assert node.pins == pins, f"page {node.page} has {node.pins} pins instead of {pins}"
            assert (node.pins == 0) == (self._evictable.get(node.page) is node), f"page {node.page}: wrongly evictable"
        order = {page: index for index, page in enumerate(self._evictable)}
        assert order.keys() <= self._by_page.keys(), "an evictable page is not cached"
        for page, node in self._evictable.items():
            if node.parent is not None and node.parent.page in order:
                assert order[page] < order[node.parent.page], "a parent precedes its child"

    def _add(self, block_hash: bytes, page: int, parent: _Node | None) -> _Node:
        assert page not in self._by_page, f"page {page} would be cached under two hashes"
        self.pool.retain([page])
        node = _Node(block_hash, page, parent)
        self._nodes[block_hash] = self._by_page[page] = node
        if parent is not None:
            parent.num_children += 1
        self._pin(node)
        self._record(BlockStored(block_hash, parent.block_hash if parent else None))
        return node

    def _pin(self, pinned: _Node) -> None:
        node: _Node | None = pinned
        while node is not None:
            node.pins += 1
            if node.pins > 1:
                break
            self._evictable.pop(node.page, None)
            node = node.parent

    def _record(self, event: BlockEvent) -> None:
        self._events.append(event)
        if len(self._events) > self._max_events:
            self._events = [BlocksCleared(), *self.stored()]
