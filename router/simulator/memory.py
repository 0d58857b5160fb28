"""A simulated worker's KV memory: the engine's own page pool and prefix cache, a page per block of the trace."""

from __future__ import annotations

from collections.abc import Sequence

from engine_core.errors import NoFreePages
from engine_core.page_pool import PagePool
from engine_core.prefix_cache import PrefixCache


class Memory:
    """Pages of one life of one worker.

    Args:
        num_pages: of its cache.
        page_size: tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.cache = PrefixCache(PagePool(num_pages), page_size)

    def num_pages(self, num_tokens: int) -> int:
        """That hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def reserve(self, hashes: Sequence[bytes], num_cacheable: int, num_tokens: int) -> tuple[list[int], int] | None:
        """Pages for a sequence, cached ones first; None where there is no room.

        Args:
            hashes: of its full blocks.
            num_cacheable: tokens that may come from the cache.

        Returns:
            The pages, and how many of them were cached.
        """
        pages = self.cache.match(hashes[: num_cacheable // self.page_size])
        num_cached = len(pages)
        try:
            return pages + self.cache.allocate(self.num_pages(num_tokens) - num_cached), num_cached
        except NoFreePages:
            self.cache.pool.release(pages)
            return None

    def store(self, hashes: Sequence[bytes], pages: Sequence[int], start: int, num_tokens: int) -> int:
        """Cache the full blocks among the first `num_tokens` tokens, of which `start` are stored already.

        Returns:
            How many are stored then.
        """
        count = min(num_tokens // self.page_size, len(hashes))
        if count > start:
            self.cache.insert(hashes[:count], pages[:count], start=start)
            return count
        return start

    def release(self, pages: Sequence[int]) -> None:
        """A sequence leaves; deep blocks are the first to be evicted."""
        self.cache.pool.release(pages)
