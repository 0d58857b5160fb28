"""Files mapped so that huge pages can back them, which Python's `mmap` leaves to chance.

The processor knows where a few thousand pages lie; memory that is gone through once from end to end in pages of
4 KiB waits for the next one at every step. Linux backs a file in memory with huge pages, of 2 MiB, where its
administrator allows that for all (`transparent_hugepage/shmem_enabled`), and since 6.1 where a process asks for a part
of its own (MADV_COLLAPSE), whatever that setting says. Either needs addresses that lie in their 2 MiB as the content
lies in the file.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from typing import Any

import numpy as np

HUGE_BYTES = 2 << 20
"""Of a huge page; on processors where it is another, what is done for them here has no effect."""

_MAP_FIXED = 0x10
_MADV_COLLAPSE = 25
_FAILED = ctypes.c_void_p(-1).value


def map_file(descriptor: int, num_bytes: int, *, writable: bool) -> memoryview:
    """A file's first bytes, shared; unmapped when the view and all that was made of it are gone. Linux only.

    Raises:
        OSError: the system refuses.
    """
    reserved = num_bytes + HUGE_BYTES
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _call("mmap", None, reserved, 0, private, -1, 0)
    address = -(-start // HUGE_BYTES) * HUGE_BYTES
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        _call("mmap", address, num_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
    except OSError:
        _call("munmap", start, reserved)
        raise
    memory = (ctypes.c_ubyte * num_bytes).from_address(address)
    weakref.finalize(memory, _call, "munmap", start, reserved).atexit = False
    view = memoryview(memory).cast("B")
    return view if writable else view.toreadonly()


def make_huge(memory: memoryview, begin: int, end: int) -> bool:
    """Have memory that nobody writes to now backed by huge pages; whether the system did. Its content stays.

    It takes a tenth of the time of touching the memory page by page; several times that where the system must first
    move others' pages to make room.

    Args:
        memory: from `map_file`, writable.
        begin, end: multiples of `HUGE_BYTES`.
    """
    part = np.frombuffer(memory, np.uint8)[begin:end]
    part[::HUGE_BYTES] += 0  # written to, as they are made only where something is
    try:
        _call("madvise", part.ctypes.data, end - begin, _MADV_COLLAPSE)
    except OSError:
        return False
    return True


@functools.cache
def _libc() -> ctypes.CDLL:
    found = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    found.mmap.argtypes, found.mmap.restype = (address, size, number, number, number, ctypes.c_long), address
    found.munmap.argtypes = (address, size)
    found.madvise.argtypes = (address, size, number)
    return found


def _call(name: str, *arguments: Any) -> int:
    result = getattr(_libc(), name)(*arguments)
    if result in (-1, _FAILED):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return int(result or 0)
