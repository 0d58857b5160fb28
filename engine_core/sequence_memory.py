"""Pages, slots and block hashes of sequences, and which row shard each sequence lies on. Host module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine_core.block_hash import BlockHasher
from engine_core.errors import NoFreePages
from engine_core.page_pool import PagePool
from engine_core.prefix_cache import BlockEvent, BlocksCleared, BlockStored, PrefixCache
from engine_core.sequence import Sequence as Seq
from engine_core.slot_table import SlotTable


@dataclass(slots=True, eq=False)
class RowShard:
    """One part of the cache and of the slots: the device holds it apart, and a sequence lies wholly on one of them.

    Attributes:
        cache: prefix cache over the shard's pages, which have ids of their own among all shards'.
        table: its slots, counted from 0.
        num_sequences: that hold pages here.
    """

    cache: PrefixCache
    table: SlotTable
    num_sequences: int = 0


def split_memory(
    num_shards: int, *, num_pages: int, page_size: int, num_slots: int, pages_per_seq: int, vocab_size: int
) -> list[RowShard]:
    """Empty row shards: shard i has pages `[i * num_pages / num_shards, ...)` and as many slots as the others.

    Args:
        num_shards: divides `num_pages` and `num_slots`, which are those of all shards together.
        page_size: tokens per page.
        pages_per_seq: P.
        vocab_size: V.
    """
    assert num_pages % num_shards == 0 and num_slots % num_shards == 0
    pages, slots = num_pages // num_shards, num_slots // num_shards
    generations = itertools.count(1)  # one count, so that no two lives of any two pages share a generation
    return [
        RowShard(
            PrefixCache(PagePool(pages, first, generations), page_size),
            SlotTable(slots, pages_per_seq, pages, vocab_size, first),
        )
        for first in range(0, num_pages, pages)
    ]


class SequenceMemory:
    """The one place that takes and returns pages and slots.

    Args:
        shards: see `split_memory`.
        page_size: tokens per page.
        namespace: what the block hashes of this engine are keyed by.
        reuse: whether prefixes are looked up and stored at all.
    """

    def __init__(self, shards: Sequence[RowShard], page_size: int, namespace: bytes, reuse: bool) -> None:
        self.shards = tuple(shards)
        self.page_size = page_size
        self._namespace = namespace
        self._reuse = reuse
        self._slack = self.shards[0].table.num_slots // 4

    @property
    def block_namespace(self) -> bytes:
        """Keys the block hashes; empty where prefixes are not reused."""
        return self._namespace if self._reuse else b""

    @property
    def free_pages(self) -> int:
        """Pages that can be had, free or evictable, on all shards together."""
        return sum(shard.cache.num_available for shard in self.shards)

    @property
    def has_free_slot(self) -> bool:
        """Whether a row shard has one."""
        return any(shard.table.num_free for shard in self.shards)

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def generation(self, page: int) -> int:
        """Which life the page is in; see `PagePool.generation`."""
        return self.shards[page // self.shards[0].cache.pool.num_pages].cache.pool.generation(page)

    def place(self, sequence: Seq, *, computes: bool, shard: int | None = None) -> bool:
        """Choose a row shard, and give the sequence the cached pages of its known tokens there and pages for the rest.

        Sets `shard`, `pages`, `num_cached` and `num_dispatched`.

        Args:
            sequence: holds nothing.
            computes: its missing tokens are computed here: it takes a slot too, and the block of its last token is
                never a cached one, because that token's logits are wanted and cached pages are not written.
            shard: the only one to try; None: all.

        Returns:
            False: no shard has room; nothing has changed.
        """
        total = len(sequence.token_ids)
        choices = range(len(self.shards)) if shard is None else [shard]
        usable = [i for i in choices if not computes or self.shards[i].table.num_free]
        if not usable:
            return False
        hashes: list[bytes] = []
        if self._reuse and not sequence.scores_prompt:  # cached tokens are not computed: nothing is known of them
            self._extend_hashes(sequence, total)
            hashes = sequence.hashes[: (total - 1 if computes else total) // self.page_size]
        for index in self._by_preference(usable, hashes):
            self._hold(sequence, index, hashes)
            try:
                self.grow(sequence, total)
            except NoFreePages:
                self.release(sequence)
                continue
            if computes:
                self.take_slot(sequence)
            return True
        return False

    def hold_cached(self, sequence: Seq, num_blocks: int) -> None:
        """Give the sequence, which holds nothing, the cached pages of its leading blocks, and nothing else.

        They lie on the row shard that has most of them; there may be none.

        Args:
            num_blocks: at most so many.
        """
        if not self._reuse:
            return
        self._extend_hashes(sequence, min(num_blocks * self.page_size, len(sequence.token_ids)))
        hashes = sequence.hashes[: max(num_blocks, 0)]
        self._hold(sequence, max(range(len(self.shards)), key=lambda i: self.shards[i].cache.count(hashes)), hashes)

    def is_cached(self, sequence: Seq) -> bool:
        """Whether the blocks that the sequence was given or has stored may still be served: see `distrust`."""
        last = sequence.hashes[sequence.num_stored - 1 : sequence.num_stored]
        return self.shards[sequence.shard].cache.count(last) == len(last)

    def touch(self, sequence: Seq) -> None:
        """The sequence waits: what is cached of its known tokens shall still be there when its turn has come."""
        if self._reuse:
            self._extend_hashes(sequence, len(sequence.token_ids))
            for shard in self.shards:
                shard.cache.touch(sequence.hashes)

    def first_missing(self, sequence: Seq) -> bytes | None:
        """Of a sequence that waits, the first full block that no shard has cached; None where it would not matter."""
        if not self._reuse or sequence.scores_prompt:
            return None
        num_cached = max(shard.cache.count(sequence.hashes) for shard in self.shards)
        return sequence.hashes[num_cached] if num_cached < len(sequence.hashes) else None

    def blocks(self, sequence: Seq, start: int, end: int) -> list[bytes]:
        """Hashes of the full blocks that tokens `start` to `end` fill; none without reuse."""
        return sequence.hashes[start // self.page_size : end // self.page_size] if self._reuse else []

    def grow(self, sequence: Seq, num_tokens: int) -> None:
        """Make sure the sequence has pages for `num_tokens` tokens.

        Raises:
            NoFreePages: nothing has changed.
        """
        missing = self.num_pages(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return
        shard = self.shards[sequence.shard]
        pages = shard.cache.allocate(missing)
        if sequence.slot >= 0:
            shard.table.set_pages(sequence.slot, len(sequence.pages), pages)
        sequence.pages.extend(pages)

    def has_slot(self, sequence: Seq) -> bool:
        """Whether `take_slot` can be called."""
        return self.shards[sequence.shard].table.num_free > 0

    def take_slot(self, sequence: Seq) -> None:
        """Give the sequence a slot of its shard and show its pages there. The caller checks `has_slot` first."""
        table = self.shards[sequence.shard].table
        sequence.slot = table.acquire(sequence.request)
        table.set_pages(sequence.slot, 0, sequence.pages)

    def store(self, sequence: Seq, num_tokens: int) -> None:
        """Put the full blocks among the first `num_tokens` tokens into the prefix cache of the sequence's shard."""
        if not self._reuse:
            return
        self._extend_hashes(sequence, num_tokens)
        count = num_tokens // self.page_size
        if count > sequence.num_stored:
            cache = self.shards[sequence.shard].cache
            cache.insert(sequence.hashes[:count], sequence.pages[:count], start=sequence.num_stored)
            sequence.num_stored = count

    def release(self, sequence: Seq) -> None:
        """Return everything the sequence holds. Calling it again does nothing."""
        if sequence.shard < 0:
            return
        shard = self.shards[sequence.shard]
        if sequence.slot >= 0:
            shard.table.release(sequence.slot)
        pages, sequence.pages = sequence.pages, []
        shard.cache.pool.release(pages)
        shard.num_sequences -= 1
        sequence.shard = sequence.slot = -1
        sequence.num_cached = sequence.num_dispatched = sequence.num_stored = 0

    def distrust(self, shard: int) -> None:
        """Damaged KV was found on a row shard: nothing that its prefix cache holds may be served."""
        self.shards[shard].cache.clear()

    def _hold(self, sequence: Seq, index: int, hashes: Sequence[bytes]) -> None:
        shard = self.shards[index]
        shard.num_sequences += 1
        sequence.shard = index
        sequence.pages = shard.cache.match(hashes)
        sequence.num_cached = sequence.num_dispatched = len(sequence.pages) * self.page_size
        sequence.num_stored = len(sequence.pages)

    def _by_preference(self, usable: list[int], hashes: Sequence[bytes]) -> list[int]:
        """The longest cached prefix first, among those that hold few more sequences than the emptiest; then the rest.

        A step takes as long as its fullest shard: without that bound all who share a prefix would crowd on one.
        """
        if len(usable) == 1:
            return usable
        fewest = min(shard.num_sequences for shard in self.shards)

        def rank(index: int) -> tuple[bool, int, int, int]:
            shard = self.shards[index]
            crowded = shard.num_sequences > fewest + self._slack
            return crowded, -shard.cache.count(hashes), shard.num_sequences, -shard.cache.pool.free_count

        return sorted(usable, key=rank)

    def _extend_hashes(self, sequence: Seq, num_tokens: int) -> None:
        """Hash the full blocks among the first `num_tokens` tokens that have not been hashed yet."""
        if num_tokens // self.page_size > len(sequence.hashes):
            hasher = BlockHasher(self.page_size, sequence.request.salt, self._namespace)
            hasher.grow(sequence.hashes, sequence.token_ids[:num_tokens])


class BlockUnion:
    """What the prefix caches of all row shards hold together, as others see it: a block is there while any has it.

    Args:
        caches: of the shards.
    """

    def __init__(self, caches: Sequence[PrefixCache]) -> None:
        self._caches = tuple(caches)
        self._holders: dict[bytes, int] = {}

    def drain_events(self) -> list[BlockEvent]:
        """How the union changed since the last call; parents come before children and leave after them."""
        if len(self._caches) == 1:
            return self._caches[0].drain_events()
        batches = [cache.drain_events() for cache in self._caches]
        if any(isinstance(event, BlocksCleared) for batch in batches for event in batch):
            return [BlocksCleared(), *self._recount()]
        return [event for batch in batches for event in batch if self._changes(event)]

    def hashes(self) -> list[bytes]:
        """All blocks, parents before children."""
        return list(dict.fromkeys(block for cache in self._caches for block in cache.hashes()))

    def _changes(self, event: BlockEvent) -> bool:
        """Count one shard's event; whether it is the first shard to store the block, or the last to lose it."""
        assert not isinstance(event, BlocksCleared)
        before = self._holders.get(event.block_hash, 0)
        after = before + (1 if isinstance(event, BlockStored) else -1)
        if after:
            self._holders[event.block_hash] = after
        else:
            del self._holders[event.block_hash]
        return 0 in (before, after)

    def _recount(self) -> Iterator[BlockStored]:
        """Start anew from what the caches hold."""
        self._holders = {}
        for cache in self._caches:
            for event in cache.stored():
                if self._changes(event):
                    yield event
