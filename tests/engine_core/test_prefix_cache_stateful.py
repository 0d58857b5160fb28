"""Random sequences against a model that recomputes everything from token ids and reference counts."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine_core.block_hash import block_hashes
from engine_core.errors import NoFreePages
from engine_core.page_pool import PagePool
from engine_core.prefix_cache import BlocksCleared, BlockStored, PrefixCache

NUM_PAGES = 7
PAGE_SIZE = 2
SALTS = [b"", b"tenant"]
TOKENS = st.lists(st.integers(0, 1), max_size=9)


class Live:
    """A running sequence: pages[i] holds its block i; the page behind the last full block is partial."""

    def __init__(self, salt, tokens, pages):
        self.keys = [(salt, tuple(tokens[:end])) for end in range(PAGE_SIZE, len(tokens) + 1, PAGE_SIZE)]
        self.hashes = block_hashes(tokens, PAGE_SIZE, salt, b"")
        self.pages = pages
        self.inserted = 0


def parent_of(key):
    return (key[0], key[1][:-PAGE_SIZE])


class CacheMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.cache = PrefixCache(self.pool, PAGE_SIZE)
        self.live = []
        self.cached = {}  # key (salt, tokens so far) -> page
        self.stamps = {}  # unpinned key -> when it became so
        self.clock = 0
        self.content = {}  # page -> key that its holders wrote
        self.key_of_hash = {}
        self.folded = set()  # hashes, from events alone

    # The model.

    def held(self):
        return Counter(page for sequence in self.live for page in sequence.pages)

    def evictable(self):
        held = self.held()
        pinned = set()
        for key, page in self.cached.items():
            while held[page] and key[1] and key not in pinned:
                pinned.add(key)
                key = parent_of(key)
        changed = True
        while changed:
            changed = False
            for key in list(pinned):
                if parent_of(key)[1] and parent_of(key) not in pinned:
                    pinned.add(parent_of(key))
                    changed = True
        return {key for key in self.cached if key not in pinned}

    def restamp(self):
        self.clock += 1
        self.stamps = {key: self.stamps.get(key, self.clock) for key in self.evictable()}

    def expect_eviction(self, count):
        """Remove from the model what the cache must evict, least recently used leaf first."""
        evicted = []
        for _ in range(count):
            parents = {parent_of(key) for key in self.cached}
            leaves = [key for key in self.stamps if key not in parents]
            if not leaves:
                break
            victim = min(leaves, key=self.stamps.__getitem__)
            del self.cached[victim], self.stamps[victim]
            evicted.append(victim)
        return evicted

    def fold(self):
        removed = []
        for event in self.cache.drain_events():
            if isinstance(event, BlockStored):
                assert event.parent is None or event.parent in self.folded
                assert event.block_hash not in self.folded
                self.folded.add(event.block_hash)
            elif isinstance(event, BlocksCleared):
                self.folded.clear()
            else:
                self.folded.remove(event.block_hash)
                removed.append(self.key_of_hash[event.block_hash])
        return removed

    # What callers do.

    @rule(salt=st.sampled_from(SALTS), tokens=TOKENS)
    def start(self, salt, tokens):
        sequence = Live(salt, tokens, [])
        self.key_of_hash.update(zip(sequence.hashes, sequence.keys, strict=True))
        matched = self.cache.match(sequence.hashes)
        expected = []
        for key in sequence.keys:
            if key not in self.cached:
                break
            expected.append(self.cached[key])
        assert matched == expected
        assert [self.content[page] for page in matched] == sequence.keys[: len(matched)]
        sequence.pages = matched
        self.live.append(sequence)
        self.restamp()
        self.extend(sequence, -(-len(tokens) // PAGE_SIZE) - len(matched))

    def extend(self, sequence, count):
        free = self.pool.free_count
        available = free + len(self.stamps)
        assert self.cache.num_available == available
        self.fold()
        try:
            pages = self.cache.allocate(count)
        except NoFreePages:
            assert count > available
            assert self.fold() == []
            self.live.remove(sequence)
            self.pool.release(sequence.pages)
        else:
            assert count <= available
            assert self.fold() == self.expect_eviction(count - free)
            sequence.pages = sequence.pages + pages
            for page, key in zip(sequence.pages, sequence.keys, strict=False):
                self.content[page] = key
        self.restamp()

    @precondition(lambda self: self.live)
    @rule(choice=st.randoms(use_true_random=False), from_start=st.booleans())
    def insert(self, choice, from_start):
        sequence = choice.choice(self.live)
        end = choice.randint(sequence.inserted, min(len(sequence.hashes), len(sequence.pages)))
        start = 0 if from_start else sequence.inserted
        served = self.cache.insert(sequence.hashes[:end], sequence.pages[:end], start=start)
        # A hole below `start` is refilled from the caller's pages; nothing else below it changes.
        first = start
        while first and sequence.keys[first - 1] not in self.cached:
            first -= 1
        for key, page in list(zip(sequence.keys, sequence.pages, strict=False))[first:end]:
            self.cached.setdefault(key, page)
        assert served == [self.cached[key] for key in sequence.keys[start:end]]
        sequence.inserted = end
        self.restamp()

    @precondition(lambda self: self.live)
    @rule(choice=st.randoms(use_true_random=False))
    def take_over_served_pages(self, choice):
        sequence = choice.choice(self.live)
        served = self.cache.match(sequence.hashes[: len(sequence.pages)])
        old = sequence.pages[: len(served)]
        sequence.pages = served + sequence.pages[len(served) :]
        self.pool.release(old)
        self.restamp()

    @precondition(lambda self: self.live)
    @rule(choice=st.randoms(use_true_random=False))
    def fork(self, choice):
        sequence = choice.choice(self.live)
        twin = Live(*sequence.keys[-1], list(sequence.pages)) if sequence.keys else Live(b"", [], list(sequence.pages))
        self.pool.retain(twin.pages)
        self.live.append(twin)
        self.restamp()

    @precondition(lambda self: self.live)
    @rule(choice=st.randoms(use_true_random=False))
    def drop_tail(self, choice):
        sequence = choice.choice(self.live)
        keep = choice.randint(0, len(sequence.pages))
        tail, sequence.pages = sequence.pages[keep:], sequence.pages[:keep]
        sequence.inserted = min(sequence.inserted, keep)
        self.pool.release(tail)
        self.restamp()

    @precondition(lambda self: self.live)
    @rule(choice=st.randoms(use_true_random=False))
    def finish(self, choice):
        sequence = choice.choice(self.live)
        self.live.remove(sequence)
        pages = list(sequence.pages)
        choice.shuffle(pages)
        self.pool.release(pages)
        self.restamp()

    @rule(count=st.integers(0, NUM_PAGES))
    def evict(self, count):
        self.fold()
        expected = self.expect_eviction(count)
        assert self.cache.evict(count) == len(expected)
        assert self.fold() == expected
        self.restamp()

    @rule(really=st.integers(0, 3))
    def clear(self, really):
        if not really:
            self.cache.clear()
            self.cached.clear()
            self.restamp()

    @rule(page=st.integers(-1, NUM_PAGES))
    def release_what_nobody_holds(self, page):
        if not self.held()[page] and page not in self.cached.values():
            with pytest.raises(AssertionError):
                self.pool.release([page])

    # What must always hold.

    @invariant()
    def integrity(self):
        self.cache.check_integrity()
        held = self.held()
        held.update(self.cached.values())
        self.pool.check_integrity(held)
        assert sorted(self.cache.pages()) == sorted(self.cached.values())
        assert len(self.cache) == len(self.cached)
        assert self.cache.num_evictable == len(self.evictable())
        assert all(self.content[page] == key for key, page in self.cached.items())
        self.fold()
        assert {self.key_of_hash[block_hash] for block_hash in self.folded} == set(self.cached)


CacheMachine.TestCase.settings = settings(CacheMachine.TestCase.settings, max_examples=200, stateful_step_count=40)
TestCacheMachine = CacheMachine.TestCase
