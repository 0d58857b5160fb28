"""Pages of one cache: who is free, how many holders each has, and which life each is in.

Owned by one thread. A holder is a sequence, a ticket or the prefix cache; each reference is released exactly once.
Misuse (double free, ids of no page) is a bug of ours and raises AssertionError, under `python -O` too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from engine_core.errors import NoFreePages


class ShareListener(Protocol):
    """Told when pages gain a second holder or are left with one (the prefix cache is the only listener)."""

    def pages_shared(self, pages: Sequence[int]) -> None:
        """Each page went from one holder to two."""

    def pages_unshared(self, pages: Sequence[int]) -> None:
        """Each page went from two holders to one."""


class PagePool:
    """Refcounts, generations and a LIFO free list (the page freed last is the warmest).

    Args:
        num_pages: in this pool.
        first_page: ids are first_page to first_page + num_pages - 1.
        generations: the count that several pools share, so that no two lives of any two pages have the same number.
    """

    def __init__(self, num_pages: int, first_page: int = 0, generations: Iterator[int] | None = None) -> None:
        assert num_pages >= 0 and first_page >= 0, (num_pages, first_page)
        self.num_pages = num_pages
        ids = range(first_page, first_page + num_pages)
        self._free = list(reversed(ids))  # the end is the top
        self._refcounts = dict.fromkeys(ids, 0)
        self._generations = dict.fromkeys(ids, 0)
        self._next_generation = itertools.count(1) if generations is None else generations
        self._listener: ShareListener | None = None

    @property
    def free_count(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def listen(self, listener: ShareListener) -> None:
        """Send sharing changes to `listener`; at most one, for life."""
        assert self._listener is None, "the pool has a listener"
        self._listener = listener

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; each has one holder, the caller, and starts a new generation.

        Raises:
            NoFreePages: fewer are free; nothing has changed.
        """
        assert count >= 0, count
        if count > len(self._free):
            raise NoFreePages(f"{count} pages needed, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._refcounts[page] = 1
            self._generations[page] = next(self._next_generation)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Add one holder to each page; a page named twice gains two."""
        shared = []
        for page in pages:
            self._refcounts[page] = refcount = self.refcount(page) + 1
            if refcount == 1:
                self._refcounts[page] = 0
                raise AssertionError(f"page {page} is retained but free")
            if refcount == 2:
                shared.append(page)
        if shared and self._listener is not None:
            self._listener.pages_shared(shared)

    def release(self, pages: Iterable[int]) -> None:
        """Drop one holder of each page; the last one frees it."""
        unshared = []
        for page in pages:
            refcount = self.refcount(page) - 1
            if refcount < 0:
                raise AssertionError(f"page {page} is released but free")
            self._refcounts[page] = refcount
            if refcount == 0:
                self._free.append(page)
            elif refcount == 1:
                unshared.append(page)
        if unshared and self._listener is not None:
            self._listener.pages_unshared(unshared)

    def refcount(self, page: int) -> int:
        """Holders of a page; 0 is free."""
        if page not in self._refcounts:
            raise AssertionError(f"page {page} is not one of {self.num_pages}")
        return self._refcounts[page]

    def generation(self, page: int) -> int:
        """Number of the allocation that gave the page out: names one life of it; 0 before the first."""
        if page not in self._refcounts:
            raise AssertionError(f"page {page} is not one of {self.num_pages}")
        return self._generations[page]

    def check_integrity(self, held: Mapping[int, int] | None = None) -> None:
        """Raise AssertionError unless every page is either free or held, once.

        Args:
            held: page -> references its holders believe to have, over all holders; None skips that comparison.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        for page, refcount in self._refcounts.items():
            assert refcount >= 0, f"page {page} has refcount {refcount}"
            assert (refcount == 0) == (page in free), f"page {page} has refcount {refcount}, free: {page in free}"
            assert refcount == 0 or self._generations[page] > 0, f"page {page} is held but was never allocated"
            if held is not None:
                expected = held.get(page, 0)
                assert refcount == expected, f"page {page} has refcount {refcount} but {expected} holders"
        assert free <= self._refcounts.keys(), "the free list holds foreign ids"
        assert held is None or held.keys() <= self._refcounts.keys(), "a holder has foreign ids"
