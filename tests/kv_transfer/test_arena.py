"""Shared memory: who may map it, who may hold a part of it, and for how long."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine_core.errors import ProtocolError
from kv_transfer.arena import ALIGNMENT, Arena, Extents, Segment, SegmentRef
from kv_transfer.receiver import ARENA_WINDOWS
from kv_transfer.sender import WINDOW_FRAMES

SIZE = 1 << 20


def test_another_process_reads_what_was_written_and_cannot_write():
    arena = Arena(SIZE)
    offset, memory = arena.lend(1000, lambda: None)
    memory[:] = np.arange(1000, dtype=np.uint16).view(np.uint8)[:1000]
    code = (
        "import sys, msgspec\n"
        "from kv_transfer.arena import Segment, SegmentRef\n"
        "ref = msgspec.json.decode(sys.argv[1], type=SegmentRef)\n"
        "part = Segment.open(ref).lend(int(sys.argv[2]), 1000, lambda: None)\n"
        "assert not part.flags.writeable\n"
        "sys.stdout.buffer.write(part.tobytes())\n"
    )
    ref = msgspec.json.encode(arena.segment.ref).decode()
    done = subprocess.run([sys.executable, "-c", code, ref, str(offset)], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == memory.tobytes()


def test_a_loan_lasts_as_long_as_any_view_of_it():
    arena, ended = Arena(SIZE), []
    _, memory = arena.lend(256, lambda: ended.append(1))
    view = memory.view(np.float32).reshape(8, 8)[2:4, 1:]
    del memory
    gc.collect()
    assert arena.lent_bytes == 256 and not ended
    del view
    assert ended == [1] and arena.lent_bytes == 0


def test_a_device_that_still_reads_the_memory_holds_it():
    """The trap: jax aliases host memory, and a dispatched step reads it later."""
    arena, ended = Arena(32 << 20), []
    _, memory = arena.lend(32 << 20, lambda: ended.append(1))
    memory.view(np.float32)[:] = 1
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda i, y: y * 0.5 + x, jnp.zeros_like(x)))
    expected = slow(np.ones((32 << 20) // 4, np.float32)).block_until_ready()
    result = slow(memory.view(np.float32))
    del memory
    was_ready, had_ended = result.is_ready(), bool(ended)
    assert was_ready or not had_ended, "the memory was free while the device read it"
    np.testing.assert_array_equal(result, expected)
    gc.collect()
    assert ended == [1]


def test_an_array_made_of_the_memory_holds_it():
    arena, ended = Arena(SIZE), []
    _, memory = arena.lend(SIZE, lambda: ended.append(1))
    memory[:] = 7
    array = jax.device_put(memory)
    del memory
    taken = arena.lend(SIZE, lambda: None)
    if taken:
        taken[1][:] = 9
    assert (np.asarray(array) == 7).all()


def test_loans_end_on_any_thread():
    arena, ended = Arena(SIZE), []
    boxes = [[arena.lend(1024, lambda: ended.append(threading.get_ident()))[1]] for _ in range(50)]
    threads = [threading.Thread(target=box.clear) for box in boxes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 50 and arena.lent_bytes == 0


def test_a_full_arena_lends_nothing_until_something_returns():
    arena = Arena(SIZE)
    loans = [arena.lend(SIZE // 4, lambda: None) for _ in range(4)]
    assert arena.lend(1, lambda: None) is None
    del loans[1]
    offset, _ = arena.lend(SIZE // 4, lambda: None)
    assert offset == SIZE // 4


@pytest.mark.parametrize(("offset", "size"), [(-1, 10), (0, 0), (0, SIZE + 1), (SIZE, 1), (1 << 62, 1 << 62)])
def test_parts_outside_are_refused(offset, size):
    with pytest.raises(ProtocolError):
        Segment.create(SIZE).lend(offset, size, lambda: None)


def test_the_size_cannot_be_changed_under_a_reader():
    segment = Segment.create(SIZE)
    descriptor = os.open(segment.ref.path, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


def memfd(name: str, size: int, seals: int) -> SegmentRef:
    descriptor = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return SegmentRef(f"/proc/{os.getpid()}/fd/{descriptor}", size - 4096, b"\0" * 16)


def test_only_segments_are_opened(tmp_path):
    segment, fixed = Segment.create(SIZE), fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    pipe = os.pipe()
    refs = [
        msgspec.structs.replace(segment.ref, token=b"?" * 16),
        msgspec.structs.replace(segment.ref, token=b""),
        msgspec.structs.replace(segment.ref, num_bytes=SIZE + 1),
        msgspec.structs.replace(segment.ref, num_bytes=-1),
        msgspec.structs.replace(segment.ref, num_bytes=1 << 60),
        SegmentRef(f"/proc/self/fd/{pipe[0]}", 64, b"?" * 16),
        memfd("something else", 8192, fixed),
        memfd("baton-kv", 8192, 0),
        memfd("baton-kv", 8192, fcntl.F_SEAL_GROW),
    ]
    for ref in refs:
        with pytest.raises(ProtocolError):
            Segment.open(ref)
    for path in ("/proc/1/fd/999999", str(tmp_path / "nothing"), str(tmp_path)):
        with pytest.raises((OSError, ProtocolError)):
            Segment.open(SegmentRef(path, 64, b"?" * 16))
    for ref in refs[5:]:
        os.close(int(ref.path.rsplit("/", 1)[1]))
    os.close(pipe[1])


class ExtentsMachine(RuleBasedStateMachine):
    """Against a list of bytes that each know their owner."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(4096)
        self.taken: dict[int, int] = {}

    @rule(size=st.integers(1, 1500))
    def take(self, size: int) -> None:
        offset = self.extents.take(size)
        whole = -(-size // ALIGNMENT) * ALIGNMENT
        free = [True] * 4096
        for start, length in self.taken.items():
            free[start : start + length] = [False] * length
        fits = [at for at in range(0, 4096 - whole + 1, ALIGNMENT) if all(free[at : at + whole])]
        assert offset == (fits[0] if fits else None)
        if offset is not None:
            self.taken[offset] = whole

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        self.extents.give_back(offset)
        del self.taken[offset]

    @invariant()
    def everything_is_counted(self) -> None:
        assert self.extents.used_bytes == sum(self.taken.values())
        if not self.taken:
            assert (self.extents._starts, self.extents._ends) == ([0], [4096])


TestExtents = ExtentsMachine.TestCase


def test_a_window_of_frames_finds_unbroken_room():
    """Frames of all sizes, given back roughly in order; one in a thousand may find none."""
    rng = random.Random(0)
    window = 144 * 64
    extents = Extents(int(window * ARENA_WINDOWS))
    taken: list[tuple[int | None, int]] = []
    failed = 0
    for _ in range(5000):
        size = 64 * rng.randint(1, window // 64 // WINDOW_FRAMES)
        while sum(each for _, each in taken) + size > window:
            offset, _ = taken.pop(min(int(rng.expovariate(0.5)), len(taken) - 1))
            if offset is not None:
                extents.give_back(offset)
        taken.append((extents.take(size), size))
        failed += taken[-1][0] is None
    assert failed <= 5
