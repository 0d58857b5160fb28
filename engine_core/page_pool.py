"""The pages of one engine: who holds them, and which life of each page it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from engine_core.errors import NoFreePages


class PagePool:
    """Reference-counted page ids `[0, num_pages)`. Errors of the caller are assertions: they are our own bugs.

    Args:
        num_pages: pages in the cache.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._refcounts = [0] * num_pages
        self._generations = [0] * num_pages

    @property
    def free_count(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, each with one reference and a new generation.

        Raises:
            NoFreePages: nothing has changed.
        """
        if count > len(self._free):
            raise NoFreePages(f"{count} pages asked for, {len(self._free)} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._refcounts[page] = 1
            self._generations[page] += 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Add a reference to each page; all are held already."""
        for page in pages:
            assert self._refcounts[page] > 0, f"page {page} is free"
            self._refcounts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page; the last one frees it."""
        for page in pages:
            assert self._refcounts[page] > 0, f"page {page} is free already"
            self._refcounts[page] -= 1
            if self._refcounts[page] == 0:
                self._free.append(page)

    def refcount(self, page: int) -> int:
        """References to a page."""
        return self._refcounts[page]

    def generation(self, page: int) -> int:
        """Which life of the page this is; grows with each allocation and never repeats."""
        return self._generations[page]

    def check_integrity(self, held: Mapping[int, int] | None = None) -> None:
        """Assert that every page is either free or held, and held as often as `held` says where given."""
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        free = set(self._free)
        for page, count in enumerate(self._refcounts):
            assert (count == 0) == (page in free), f"page {page}: {count} references, free: {page in free}"
            if held is not None:
                assert count == held.get(page, 0), f"page {page}: {count} references, {held.get(page, 0)} holders"
