import time

import pytest

from engine_core.block_hash import block_hashes
from engine_core.errors import NoFreePages
from engine_core.page_pool import PagePool
from engine_core.prefix_cache import BlockRemoved, BlocksCleared, BlockStored, PrefixCache


def hashes_of(*tokens):
    return block_hashes(tokens, 1, b"", b"")


def make(num_pages):
    pool = PagePool(num_pages)
    return pool, PrefixCache(pool, page_size=1)


def start(pool, cache, *tokens):
    """Compute a sequence's blocks; the pages stay held."""
    hashes = hashes_of(*tokens)
    pages = cache.match(hashes)
    pages += cache.allocate(len(hashes) - len(pages))
    cache.insert(hashes, pages)
    return pages


def store(pool, cache, *tokens):
    """Run a sequence to its end: its pages stay in the cache alone."""
    pages = start(pool, cache, *tokens)
    pool.release(pages)
    return pages


def test_the_longest_prefix_is_found_and_retained():
    pool, cache = make(8)
    pages = store(pool, cache, 1, 2, 3)
    assert cache.match(hashes_of(1, 2, 9)) == pages[:2]
    assert [pool.refcount(page) for page in pages] == [2, 2, 1]
    assert cache.match(hashes_of(9, 2, 3)) == []
    assert cache.num_evictable == 1


def test_the_least_recently_released_leaf_goes_first():
    pool, cache = make(6)
    a = store(pool, cache, 1, 2)
    b = store(pool, cache, 3, 4)
    pool.release(cache.match(hashes_of(1)))  # touches a's first block alone
    cache.drain_events()
    assert cache.evict(3) == 3
    order = [event.block_hash for event in cache.drain_events()]
    assert order == [hashes_of(1, 2)[1], hashes_of(3, 4)[1], hashes_of(3, 4)[0]]
    assert cache.pages() == [a[0]]
    assert pool.free_count == 5
    assert len(b) == 2


def test_held_pages_and_their_ancestors_stay():
    pool, cache = make(4)
    store(pool, cache, 1, 2, 3)
    held = cache.match(hashes_of(1, 2))
    assert cache.evict(4) == 1
    assert cache.pages() == held
    pool.release(held)
    assert cache.evict(4) == 2
    assert pool.free_count == 4


def test_a_held_child_of_unheld_parents_pins_them():
    pool, cache = make(8)
    store(pool, cache, 1, 2)
    own = pool.allocate(3)
    cache.insert(hashes_of(1, 2, 3), own)  # computed without a lookup: two duplicates, one new block
    assert (cache.num_evictable, cache.evict(8)) == (0, 0)
    pool.release(own)
    assert (cache.num_evictable, cache.evict(8)) == (3, 3)


def test_a_duplicate_keeps_the_older_page():
    pool, cache = make(4)
    old = store(pool, cache, 1)
    new = pool.allocate(2)
    assert cache.insert(hashes_of(1, 2), new) == [old[0], new[1]]
    assert pool.refcount(new[0]) == 1
    assert cache.insert(hashes_of(1, 2), new) == [old[0], new[1]]
    assert [pool.refcount(page) for page in new] == [1, 2]


def test_insert_from_start_rebuilds_what_is_gone():
    pool, cache = make(4)
    pages = pool.allocate(3)
    assert cache.insert(hashes_of(1, 2), pages[:2]) == pages[:2]
    assert cache.insert(hashes_of(1, 2, 3), pages, start=2) == pages[2:]
    cache.clear()
    assert cache.insert(hashes_of(1, 2, 3), pages, start=3) == []
    assert cache.insert(hashes_of(1, 2, 3), pages, start=2) == pages[2:]
    assert cache.pages() == pages
    cache.check_integrity()


def test_allocate_evicts_what_is_missing_or_changes_nothing():
    pool, cache = make(4)
    store(pool, cache, 1, 2, 3)
    assert cache.num_available == 4
    held = cache.match(hashes_of(1))
    cache.drain_events()
    with pytest.raises(NoFreePages, match="4 pages needed, 1 of 4 are free and 2 evictable"):
        cache.allocate(4)
    assert (pool.free_count, len(cache), cache.drain_events()) == (1, 3, [])
    assert len(cache.allocate(2)) == 2
    assert cache.drain_events() == [BlockRemoved(hashes_of(1, 2, 3)[2])]
    cache.check_integrity()
    assert held == [0]


def test_allocate_may_take_every_page():
    pool, cache = make(4)
    store(pool, cache, 1, 2, 3)
    assert sorted(cache.allocate(4)) == [0, 1, 2, 3]
    with pytest.raises(NoFreePages):
        cache.allocate(1)
    cache.check_integrity()


def test_clear_leaves_holders_their_pages():
    pool, cache = make(4)
    pages = store(pool, cache, 1, 2)
    held = cache.match(hashes_of(1))
    cache.clear()
    assert (len(cache), cache.num_evictable) == (0, 0)
    pool.check_integrity({held[0]: 1})
    assert held == pages[:1]
    pool.release(held)
    assert pool.free_count == 4
    cache.check_integrity()


def test_events_in_order():
    pool, cache = make(4)
    store(pool, cache, 1, 2)
    one, two = hashes_of(1, 2)
    assert cache.drain_events() == [BlockStored(one, None), BlockStored(two, one)]
    cache.evict(1)
    assert cache.drain_events() == [BlockRemoved(two)]
    cache.clear()
    assert cache.drain_events() == [BlocksCleared()]
    assert cache.drain_events() == []


def test_events_nobody_reads_stay_bounded_and_complete():
    pool, cache = make(4)
    for token in range(1000):
        store(pool, cache, token, token)
    events = cache.drain_events()
    assert len(events) <= 4 * 4 + 64
    assert isinstance(events[0], BlocksCleared)
    cached = set()
    for event in events[1:]:
        if isinstance(event, BlockStored):
            assert event.parent is None or event.parent in cached
            cached.add(event.block_hash)
        else:
            cached.remove(event.block_hash)
    assert cached == {hash_ for token in (998, 999) for hash_ in hashes_of(token, token)}


def test_hashes_of_no_chain_are_our_bug():
    pool, cache = make(4)
    store(pool, cache, 1, 2)
    one, two = hashes_of(1, 2)
    with pytest.raises(AssertionError, match="not one chain"):
        cache.match([two, one])
    with pytest.raises(AssertionError, match="under two hashes"):
        cache.insert(hashes_of(7), [0])
    pool.check_integrity({0: 1, 1: 1})


def test_eviction_does_not_search():
    """Evicting one by one from a large cache whose oldest pages are held: a scan per page would take minutes."""
    pool, cache = make(200_000)
    held = [page for token in range(50_000) for page in start(pool, cache, token)]
    for token in range(50_000, 100_000):
        store(pool, cache, token, token)
    start_s = time.process_time()
    assert sum(cache.evict(1) for _ in range(100_000)) == 100_000
    assert cache.evict(1) == 0
    assert time.process_time() - start_s < 20
    pool.release(held)
    assert cache.num_available == 200_000
