"""Files mapped for huge pages."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kv_transfer import arena as arena_module
from kv_transfer.arena import HEAD_BYTES, Arena, Segment
from kv_transfer.mapping import HUGE_BYTES, make_huge, map_file

SIZE = 3 * HUGE_BYTES + 4096


@pytest.fixture
def descriptor() -> Iterator[int]:
    found = os.memfd_create("test")
    os.ftruncate(found, SIZE)
    yield found
    os.close(found)


def address_of(memory: memoryview) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


def is_mapped(address: int) -> bool:
    return any(line.startswith(f"{address:x}-") for line in Path("/proc/self/maps").read_text().splitlines())


def test_two_mappings_share_the_file(descriptor):
    written, read = map_file(descriptor, SIZE, writable=True), map_file(descriptor, SIZE, writable=False)
    assert address_of(written) % HUGE_BYTES == address_of(read) % HUGE_BYTES == 0
    np.frombuffer(written, np.uint8)[:] = np.arange(SIZE, dtype=np.uint32).view(np.uint8)[:SIZE]
    assert bytes(read) == bytes(written) == os.pread(descriptor, SIZE, 0)


def test_what_is_made_huge_keeps_its_content(descriptor):
    memory, other = map_file(descriptor, SIZE, writable=True), map_file(descriptor, SIZE, writable=False)
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    np.frombuffer(memory, np.uint8)[:] = content
    make_huge(memory, 0, HUGE_BYTES)
    make_huge(memory, HUGE_BYTES, 3 * HUGE_BYTES)
    np.testing.assert_array_equal(np.frombuffer(other, np.uint8), content)
    np.testing.assert_array_equal(np.frombuffer(memory, np.uint8), content)


def test_it_is_unmapped_when_nobody_holds_a_part_of_it(descriptor):
    memory = map_file(descriptor, SIZE, writable=True)
    address = address_of(memory)
    view = np.frombuffer(memory, np.uint8, 64, 4096).view(np.float32)[3:]
    del memory
    gc.collect()
    assert is_mapped(address)
    del view
    gc.collect()
    assert not is_mapped(address)


def test_what_the_system_refuses_is_an_error_and_leaves_nothing():
    before, size = address_space_bytes(), 1 << 40
    with pytest.raises(OSError, match="mmap: Bad file descriptor"):
        map_file(1 << 20, size, writable=True)
    assert address_space_bytes() < before + size


def address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def test_only_what_an_arena_uses_is_made_huge_and_once(monkeypatch):
    asked = spied(monkeypatch, answer=True)
    arena = Arena(SIZE)
    token = arena.segment.ref.token
    loans = [arena.lend(size, lambda: None) for size in (1000, HUGE_BYTES, HUGE_BYTES // 2)]
    assert asked == [(0, HUGE_BYTES), (HUGE_BYTES, 2 * HUGE_BYTES)]
    loans.append(arena.lend(HUGE_BYTES, lambda: None))
    assert asked[2:] == [(2 * HUGE_BYTES, 3 * HUGE_BYTES)]
    loans.append(arena.lend(SIZE - HEAD_BYTES - arena.lent_bytes - 64, lambda: None))
    loans.clear()
    arena.lend(2 * HUGE_BYTES, lambda: None)
    assert len(asked) == 3, "the last of it is no whole huge page"
    assert Segment.open(arena.segment.ref).ref.token == token


def test_a_system_that_refuses_huge_pages_is_asked_once(monkeypatch):
    asked = spied(monkeypatch, answer=False)
    arena = Arena(SIZE)
    loans = [arena.lend(HUGE_BYTES, lambda: None) for _ in range(3)]
    assert len(asked) == 1
    for _, memory in loans:
        memory[:] = 1


def spied(monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[tuple[int, int]]:
    """What `make_huge` is asked for; it does it, and says `answer`."""
    asked: list[tuple[int, int]] = []

    def note(memory: memoryview, begin: int, end: int) -> bool:
        asked.append((begin, end))
        make_huge(memory, begin, end)
        return answer

    monkeypatch.setattr(arena_module, "make_huge", note)
    return asked
