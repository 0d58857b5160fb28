"""Memory that two processes map, and loans of it.

A `Segment` is a sealed memfd: it has no name in any directory, so that no crash leaves it behind, and its size can
never change, so that no peer can make a mapping of it fault. Others open it by the path of its descriptor under
`/proc`; the token in its first bytes shows both that they opened the right one and that they run on the same host.

An `Arena` gives parts of a segment away as arrays. A part is free again when the array and every view of it are gone,
whoever held them: a device that still reads the memory keeps the array alive. Nothing is released by hand.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import sys
import weakref
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from engine_core.errors import ProtocolError
from kv_transfer.mapping import HUGE_BYTES, make_huge, map_file

ALIGNMENT = 64
"""Of every loan: what lets a CPU device use it in place."""
TOKEN_BYTES = 16
HEAD_BYTES = 4096
"""In front of a segment's content."""
MAX_SEGMENT_BYTES = 1 << 40

Mapping = memoryview | mmap.mmap

_MEMFD_NAME = "baton-kv"


class SegmentRef(msgspec.Struct, frozen=True, array_like=True):
    """How another process finds a segment.

    Attributes:
        path: of the open descriptor.
        num_bytes: of content.
        token: what stands in front of the content.
    """

    path: str
    num_bytes: int
    token: bytes


class Segment:
    """Memory of which `ref` tells others; anonymous, with no `ref`, where the system has no memfd."""

    def __init__(self, mapping: Mapping, num_bytes: int, ref: SegmentRef | None, descriptor: int | None) -> None:
        self.ref = ref
        self.num_bytes = num_bytes
        self._mapping = mapping
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(cls, num_bytes: int) -> Segment:
        """New zeroed memory; it costs nothing until it is touched."""
        if sys.platform != "linux":
            return cls(mmap.mmap(-1, HEAD_BYTES + num_bytes), num_bytes, None, None)
        descriptor = os.memfd_create(_MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, HEAD_BYTES + num_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _size_seals() | fcntl.F_SEAL_SEAL)
            mapping = map_file(descriptor, HEAD_BYTES + num_bytes, writable=True)
        except BaseException:
            os.close(descriptor)
            raise
        token = secrets.token_bytes(TOKEN_BYTES)
        mapping[:TOKEN_BYTES] = token
        ref = SegmentRef(f"/proc/{os.getpid()}/fd/{descriptor}", num_bytes, token)
        return cls(mapping, num_bytes, ref, descriptor)

    @classmethod
    def open(cls, ref: SegmentRef) -> Segment:
        """Map another process's segment, to read.

        Raises:
            OSError: it is not on this host, or not this user's.
            ProtocolError: `ref` does not name a segment.
        """
        if not 0 <= ref.num_bytes <= MAX_SEGMENT_BYTES or len(ref.token) != TOKEN_BYTES:
            raise ProtocolError("a malformed reference to shared memory")
        if sys.platform != "linux" or not os.readlink(ref.path).startswith(f"/memfd:{_MEMFD_NAME}"):
            raise ProtocolError(f"{ref.path} is not a segment")
        descriptor = os.open(ref.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if not stat.S_ISREG(found.st_mode) or seals & _size_seals() != _size_seals():
                raise ProtocolError(f"the size of {ref.path} is not sealed")
            if found.st_size != HEAD_BYTES + ref.num_bytes:
                raise ProtocolError(f"{ref.path} has {found.st_size} bytes")
            mapping = map_file(descriptor, found.st_size, writable=False)
        finally:
            os.close(descriptor)
        if mapping[:TOKEN_BYTES] != ref.token:
            raise ProtocolError(f"{ref.path} is another segment")
        return cls(mapping, ref.num_bytes, ref, None)

    def lend(self, offset: int, num_bytes: int, on_return: Callable[[], None]) -> np.ndarray:
        """A part as `[num_bytes]` u8.

        Args:
            offset: from the beginning of the content.
            num_bytes: at least 1.
            on_return: called, on any thread, once nobody holds the array or a view of it.

        Raises:
            ProtocolError: it does not lie within the segment.
        """
        if offset < 0 or num_bytes <= 0 or offset + num_bytes > self.num_bytes:
            raise ProtocolError(f"bytes {offset} to {offset + num_bytes} of {self.num_bytes}")
        array = np.frombuffer(self._mapping, np.uint8, num_bytes, HEAD_BYTES + offset)
        weakref.finalize(array, on_return).atexit = False
        return array

    def make_huge(self, begin: int, end: int) -> bool:
        """See `mapping`; begin and end are those of a part of the file, head and all."""
        return isinstance(self._mapping, memoryview) and make_huge(self._mapping, begin, end)


class Arena:
    """Loans of one segment. `lend` is called on one thread; loans may end on any."""

    def __init__(self, num_bytes: int) -> None:
        self.segment = Segment.create(num_bytes)
        self._used_bytes = 0  # of the file, a multiple of HUGE_BYTES: what lies beyond was never lent
        self._can_be_huge = True
        self._extents = Extents(num_bytes)
        self._returned: deque[int] = deque()

    @property
    def lent_bytes(self) -> int:
        """In loans that have not ended."""
        self._reclaim()
        return self._extents.used_bytes

    def lend(self, num_bytes: int, on_return: Callable[[], None]) -> tuple[int, np.ndarray] | None:
        """Offset and memory, `[num_bytes]` u8, content unspecified; None while there is no room.

        Args:
            num_bytes: at least 1.
            on_return: called on any thread when the loan has ended; it must not call back.
        """
        self._reclaim()
        offset = self._extents.take(num_bytes)
        if offset is None:
            return None
        self._begin_to_use(HEAD_BYTES + offset + num_bytes)

        def end() -> None:
            self._returned.append(offset)
            on_return()

        return offset, self.segment.lend(offset, num_bytes, end)

    def _begin_to_use(self, end: int) -> None:
        """What lies in front of `end` in the file is about to be written to."""
        whole = (HEAD_BYTES + self.segment.num_bytes) // HUGE_BYTES * HUGE_BYTES
        end = min(-(-end // HUGE_BYTES) * HUGE_BYTES, whole)
        if self._can_be_huge and end > self._used_bytes:
            self._can_be_huge = self.segment.make_huge(self._used_bytes, end)
            self._used_bytes = end

    def _reclaim(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._extents.give_back(self._returned.popleft())


class Extents:
    """Which parts of `[0, size)` are free: first fit by address, so that the memory in use stays small and warm."""

    def __init__(self, size: int) -> None:
        self.used_bytes = 0
        self._starts = [0] if size else []  # of the free parts, ascending
        self._ends = [size] if size else []
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int | None:
        """Offset of `size` bytes, a multiple of `ALIGNMENT`; None when no free part is large enough."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        i = next((i for i, start in enumerate(self._starts) if self._ends[i] - start >= size), None)
        if i is None:
            return None
        start = self._starts[i]
        if self._ends[i] - start == size:
            del self._starts[i], self._ends[i]
        else:
            self._starts[i] += size
        self._taken[start] = size
        self.used_bytes += size
        return start

    def give_back(self, offset: int) -> None:
        """Free what `take` gave out at `offset`; neighbours become one."""
        size = self._taken.pop(offset)
        self.used_bytes -= size
        start, end = offset, offset + size
        i = bisect.bisect(self._starts, start)
        if i < len(self._starts) and self._starts[i] == end:
            end = self._ends[i]
            del self._starts[i], self._ends[i]
        if i and self._ends[i - 1] == start:
            self._ends[i - 1] = end
        else:
            self._starts.insert(i, start)
            self._ends.insert(i, end)


def _size_seals() -> int:
    return int(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
