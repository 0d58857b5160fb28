"""Which prompt tokens to compute next: chunked prefill over a queue of sequences, first come first served.

Used by the prefill worker for every request and by the decode worker for local prefill and resumed sequences.
"""

from __future__ import annotations

from collections import deque

from engine_core.batch import Chunk
from engine_core.block_hash import BlockHasher
from engine_core.errors import NoFreePages
from engine_core.prefix_cache import PrefixCache
from engine_core.sequence import Sequence
from engine_core.slot_table import SlotTable


class SequenceMemory:
    """Pages, slots and block hashes of sequences: the one place that takes and returns them.

    Args:
        cache: prefix cache over the page pool.
        table: slot rows.
        page_size: tokens per page.
        namespace: what the block hashes of this engine are keyed by.
        reuse: whether prefixes are looked up and stored at all.
    """

    def __init__(self, cache: PrefixCache, table: SlotTable, page_size: int, namespace: bytes, reuse: bool) -> None:
        self.cache = cache
        self.table = table
        self.page_size = page_size
        self._namespace = namespace
        self._reuse = reuse

    @property
    def block_namespace(self) -> bytes:
        """Keys the block hashes; empty where prefixes are not reused."""
        return self._namespace if self._reuse else b""

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def match_prefix(self, sequence: Sequence) -> None:
        """Give the sequence the cached pages of its known tokens. Sets `pages`, `num_cached` and `num_dispatched`."""
        if not self._reuse:
            return
        self._extend_hashes(sequence, len(sequence.token_ids))
        sequence.pages = self.cache.match(sequence.hashes)
        sequence.num_cached = len(sequence.pages) * self.page_size
        sequence.num_dispatched = sequence.num_cached
        sequence.num_stored = len(sequence.pages)

    def touch(self, sequence: Sequence) -> None:
        """The sequence waits: what is cached of its known tokens shall still be there when its turn has come."""
        if self._reuse:
            self._extend_hashes(sequence, len(sequence.token_ids))
            self.cache.touch(sequence.hashes)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Make sure the sequence has pages for `num_tokens` tokens.

        Raises:
            NoFreePages: nothing has changed.
        """
        missing = self.num_pages(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return
        pages = self.cache.allocate(missing)
        if sequence.slot >= 0:
            self.table.set_pages(sequence.slot, len(sequence.pages), pages)
        sequence.pages.extend(pages)

    def take_slot(self, sequence: Sequence) -> None:
        """Give the sequence a slot and show its pages there. The caller checks `table.num_free` first."""
        sequence.slot = self.table.acquire(sequence.request)
        self.table.set_pages(sequence.slot, 0, sequence.pages)

    def store(self, sequence: Sequence, num_tokens: int) -> None:
        """Put the full blocks among the first `num_tokens` tokens into the prefix cache."""
        if not self._reuse:
            return
        self._extend_hashes(sequence, num_tokens)
        count = num_tokens // self.page_size
        if count > sequence.num_stored:
            self.cache.insert(sequence.hashes[:count], sequence.pages[:count], start=sequence.num_stored)
            sequence.num_stored = count

    def blocks(self, sequence: Sequence, start: int, end: int) -> list[bytes]:
        """Hashes of the full blocks of a matched sequence that tokens `start` to `end` fill; none without reuse."""
        return sequence.hashes[start // self.page_size : end // self.page_size]

    def release(self, sequence: Sequence) -> None:
        """Return everything the sequence holds. Calling it again does nothing."""
        if sequence.slot >= 0:
            self.table.release(sequence.slot)
            sequence.slot = -1
        pages, sequence.pages = sequence.pages, []
        self.cache.pool.release(pages)
        sequence.num_cached = sequence.num_dispatched = sequence.num_stored = 0

    def _extend_hashes(self, sequence: Sequence, num_tokens: int) -> None:
        """Hash the full blocks among the first `num_tokens` tokens that have not been hashed yet."""
        if num_tokens // self.page_size > len(sequence.hashes):
            hasher = BlockHasher(self.page_size, sequence.request.salt, self._namespace)
            hasher.grow(sequence.hashes, sequence.token_ids[:num_tokens])


class ChunkQueue:
    """Sequences whose known tokens are not all in the cache yet.

    Args:
        memory: where pages and slots come from.
    """

    def __init__(self, memory: SequenceMemory) -> None:
        self._memory = memory
        self._waiting: deque[Sequence] = deque()
        self._active: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._active)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not been given pages yet."""
        return len(self._waiting)

    @property
    def queued_tokens(self) -> int:
        """Tokens still to be computed."""
        return sum(len(s.token_ids) - s.num_dispatched for s in (*self._active, *self._waiting))

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Queue a sequence; `first` is for one that was preempted."""
        self._memory.touch(sequence)
        if first:
            self._waiting.appendleft(sequence)
        else:
            self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; what it holds stays its own."""
        for queue in (self._waiting, self._active):
            if sequence in queue:
                queue.remove(sequence)

    def next_chunks(self, num_tokens: int, num_rows: int) -> list[Chunk]:
        """Chunks for one step, and advance their sequences past them.

        Args:
            num_tokens: tokens of the step at most.
            num_rows: sequences of the step at most.
        """
        chunks: list[Chunk] = []
        left = num_tokens
        coming: set[bytes] = set()  # blocks that this step fills
        while left > 0 and len(chunks) < num_rows and (self._active or self._admit(coming)):
            sequence = self._active[0]
            total = len(sequence.token_ids)
            start = sequence.num_dispatched
            count = min(left, total - start)
            chunks.append(Chunk(sequence, start, count, is_last=start + count == total))
            sequence.num_dispatched += count
            coming.update(self._memory.blocks(sequence, start, start + count))
            left -= count
            if sequence.num_dispatched < total:
                break
            sequence.num_sampled += 1
            self._active.popleft()
        return chunks

    def _admit(self, coming: set[bytes]) -> bool:
        """The first of those that wait gets its pages and a slot, if there are any.

        As late as possible: what was stored meanwhile is found in the cache, and what this step computes will be.
        """
        if not self._waiting or not self._memory.table.num_free or not self._reserve(self._waiting[0], coming):
            return False
        self._active.append(self._waiting.popleft())
        return True

    def _reserve(self, sequence: Sequence, coming: set[bytes]) -> bool:
        memory = self._memory
        total = len(sequence.token_ids)
        memory.match_prefix(sequence)
        if not coming.isdisjoint(sequence.hashes[len(sequence.pages) : len(sequence.pages) + 1]):
            memory.release(sequence)
            return False
        if sequence.num_cached >= total:
            self._recompute_last_block(sequence)
        try:
            memory.grow(sequence, total)
        except NoFreePages:
            memory.release(sequence)
            return False
        memory.take_slot(sequence)
        return True

    def _recompute_last_block(self, sequence: Sequence) -> None:
        """The last token's logits are needed, and cached pages are never written: compute its block again."""
        page = sequence.pages.pop()
        self._memory.cache.pool.release([page])
        sequence.num_cached -= self._memory.page_size
        sequence.num_dispatched = sequence.num_cached
        sequence.num_stored = len(sequence.pages)
