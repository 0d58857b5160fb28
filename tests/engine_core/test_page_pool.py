from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from engine_core.errors import NoFreePages
from engine_core.page_pool import PagePool

NUM_PAGES = 6


def test_the_page_freed_last_is_taken_first():
    pool = PagePool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release([0, 1])
    assert pool.allocate(2) == [1, 0]


def test_too_many_pages_change_nothing():
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(NoFreePages, match="3 pages needed, 2 of 3 are free"):
        pool.allocate(3)
    pool.check_integrity({0: 1})
    assert [pool.generation(page) for page in range(3)] == [1, 0, 0]
    assert pool.allocate(0) == []
    assert pool.free_count == 2


@pytest.mark.parametrize("page", [-1, 3, 10**9])
@pytest.mark.parametrize("method", ["refcount", "generation"])
def test_foreign_ids_are_refused(page, method):
    pool = PagePool(3)
    pool.allocate(3)
    with pytest.raises(AssertionError, match="is not one of 3"):
        getattr(pool, method)(page)
    for change in (pool.retain, pool.release):
        with pytest.raises(AssertionError, match="is not one of 3"):
            change([page])
    pool.check_integrity({0: 1, 1: 1, 2: 1})


def test_free_pages_are_neither_released_nor_retained():
    pool = PagePool(3)
    with pytest.raises(AssertionError, match="released but free"):
        pool.release([1])
    with pytest.raises(AssertionError, match="retained but free"):
        pool.retain([1])
    pool.check_integrity({})


def test_a_page_released_twice_at_once_is_told():
    pool = PagePool(1)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="released but free"):
        pool.release([0, 0])


def test_check_integrity_compares_with_the_holders():
    pool = PagePool(3)
    pool.allocate(2)
    for held in ({0: 1}, {0: 1, 1: 2}, {0: 1, 1: 1, 2: 1}, {0: 1, 1: 1, 3: 1}):
        with pytest.raises(AssertionError):
            pool.check_integrity(held)


class PoolMachine(RuleBasedStateMachine):
    """Random holders against a dict of reference counts."""

    holders = Bundle("holders")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.held = Counter()
        self.generations = [0] * NUM_PAGES

    @rule(target=holders, count=st.integers(0, NUM_PAGES + 1))
    def allocate(self, count):
        if count > NUM_PAGES - len(self.held):
            with pytest.raises(NoFreePages):
                self.pool.allocate(count)
            return multiple()
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        assert not self.held.keys() & set(pages)
        for page in pages:
            self.generations[page] = max(self.generations) + 1
        self.held.update(pages)
        return pages

    @rule(target=holders, pages=holders)
    def retain(self, pages):
        self.pool.retain(pages)
        self.held.update(pages)
        return list(pages)

    @rule(pages=consumes(holders), order=st.randoms(use_true_random=False))
    def release(self, pages, order):
        order.shuffle(pages)
        self.pool.release(pages)
        self.held -= Counter(pages)

    @rule(page=st.integers(-1, NUM_PAGES))
    def release_what_nobody_holds(self, page):
        if page not in self.held:
            with pytest.raises(AssertionError):
                self.pool.release([page])

    @invariant()
    def integrity(self):
        self.pool.check_integrity(self.held)
        assert self.pool.free_count == NUM_PAGES - len(self.held)
        assert [self.pool.generation(page) for page in range(NUM_PAGES)] == self.generations


TestPoolMachine = PoolMachine.TestCase
