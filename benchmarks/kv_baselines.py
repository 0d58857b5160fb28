"""What `baton bench kv` compares with: memcpy, the same work without hand-offs, raw sockets."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.kv_link import pace
from kv_transfer.arena import ALIGNMENT
from kv_transfer.blocks import payload_rows
from kv_transfer.digester import Digester
from kv_transfer.layout import BlockLayout
from kv_transfer.sender import FRAME_BYTES

SOCKET_BYTES = 1 << 20  # of one send or receive call
TARGET_BYTES = 256 << 20  # of memory to receive into, again and again


def touched(num_bytes: int) -> np.ndarray:
    """Memory of this process, `[num_bytes]` u8, written to before, at such an address as an arena's."""
    memory = np.ones(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes]


class Memcpy:
    """One thread, one process, private memory that has been touched before.

    Args:
        source: as many bytes as the largest move.
    """

    def __init__(self, source: np.ndarray) -> None:
        self.name = "memcpy"
        self._source = source
        self._target = touched(len(source))
        self._cpu_s = 0.0

    def move(self, num_bytes: int) -> float:
        """Copy."""
        cpu_s, start_s = time.process_time(), time.monotonic()
        np.copyto(self._target[:num_bytes], self._source[:num_bytes])
        self._cpu_s += time.process_time() - cpu_s
        return time.monotonic() - start_s

    def cpu_s(self) -> float:
        """While copying."""
        return self._cpu_s

    def close(self) -> None:
        """Nothing to end."""


class Digests:
    """What checksums cost: a digest of every block, at one end. A hand-off takes one at each.

    Args:
        source: as many bytes as the largest move.
        layout: of the blocks.
        digester: that hand-offs have.
    """

    def __init__(self, source: np.ndarray, layout: BlockLayout, digester: Digester) -> None:
        self._digester = digester
        self.name = "checksum, one pass"
        self._source = source
        self._layout = layout
        self._cpu_s = 0.0

    def move(self, num_bytes: int) -> float:
        """Read all bytes once."""
        n = num_bytes // self._layout.block_bytes
        rows = payload_rows(self._source[: n * self._layout.block_bytes], n, self._layout)
        cpu_s, start_s = time.process_time(), time.monotonic()
        self._digester.reader(rows).digests(range(n))
        self._cpu_s += time.process_time() - cpu_s
        return time.monotonic() - start_s

    def cpu_s(self) -> float:
        """While reading."""
        return self._cpu_s

    def close(self) -> None:
        """Nothing to end."""


class SameWork:
    """All that a hand-off in shared memory does to the bytes, in one thread and without a message: the floor.

    A frame at a time: copied with digests into memory that has been touched before, then verified.

    Args:
        source: as many bytes as the largest move.
        layout: of the blocks.
        digester: that hand-offs have.
    """

    def __init__(self, source: np.ndarray, layout: BlockLayout, digester: Digester) -> None:
        self._digester = digester
        self.name = "copy, digest, verify"
        self._source = source
        self._target = touched(len(source))
        self._layout = layout
        self._cpu_s = 0.0

    def move(self, num_bytes: int) -> float:
        """Copy and verify."""
        layout = self._layout
        n, each = num_bytes // layout.block_bytes, max(1, FRAME_BYTES // layout.block_bytes)
        rows = payload_rows(self._source[: n * layout.block_bytes], n, layout)
        cpu_s, start_s = time.process_time(), time.monotonic()
        reader = self._digester.reader(rows)
        for at in range(0, n, each):
            begin, count = at * layout.block_bytes, min(each, n - at)
            landed = payload_rows(self._target[begin : begin + count * layout.block_bytes], count, layout)
            copied = reader.copy(at, landed, streams=True)
            assert copied == self._digester.reader(landed).digests(range(count))
        self._cpu_s += time.process_time() - cpu_s
        return time.monotonic() - start_s

    def cpu_s(self) -> float:
        """While working."""
        return self._cpu_s

    def close(self) -> None:
        """Nothing to end."""


class RawSockets:
    """Bytes over loopback TCP, a thread per connection at each end, no checksum, no protocol.

    Args:
        num_connections: among which the bytes are split.
        source: as many bytes as the largest move.
        link_gbit: what they may send together, in Gbit/s; None: as fast as it goes.
    """

    def __init__(self, num_connections: int, source: np.ndarray, link_gbit: float | None = None) -> None:
        self.name = f"raw sockets x{num_connections}"
        self._source = source
        self._cpu_s = 0.0
        with socket.create_server(("127.0.0.1", 0)) as listener:
            if link_gbit is not None:
                pace(listener, link_gbit, num_connections)
            port = listener.getsockname()[1]
            self._pipe, self._process = start_child(_receive_raw, port, num_connections)
            self._sockets = [listener.accept()[0] for _ in range(num_connections)]
        for each in self._sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def move(self, num_bytes: int) -> float:
        """Send all, wait until all has been received."""
        self._pipe.send(num_bytes)
        self._pipe.recv()
        cpu_s, start_s = time.process_time(), time.monotonic()
        for at in range(0, num_bytes, TARGET_BYTES):
            _each(self._sockets, self._source[at : min(at + TARGET_BYTES, num_bytes)], _send)
        end_s = float(self._pipe.recv())
        self._cpu_s += time.process_time() - cpu_s
        return end_s - start_s

    def cpu_s(self) -> float:
        """Of both ends, while bytes were on the way."""
        self._pipe.send(0)
        return self._cpu_s + float(self._pipe.recv())

    def close(self) -> None:
        """Hang up."""
        self._pipe.close()
        for each in self._sockets:
            each.close()
        self._process.join()


def _receive_raw(pipe: Connection, port: int, num_connections: int) -> None:
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(num_connections)]
    target = touched(TARGET_BYTES)
    used_s = 0.0
    while True:
        try:
            num_bytes = pipe.recv()
        except EOFError:
            return
        if not num_bytes:
            pipe.send(used_s)
            continue
        cpu_s = time.process_time()
        pipe.send("ready")
        for rest in range(num_bytes, 0, -TARGET_BYTES):
            _each(sockets, target[:rest], _receive)
        pipe.send(time.monotonic())
        used_s += time.process_time() - cpu_s


def _each(sockets: list[socket.socket], memory: np.ndarray, work: Any) -> None:
    shares = np.array_split(memory, len(sockets))
    threads = [threading.Thread(target=work, args=pair) for pair in zip(sockets[1:], shares[1:], strict=True)]
    for thread in threads:
        thread.start()
    work(sockets[0], shares[0])
    for thread in threads:
        thread.join()


def _send(connected: socket.socket, share: np.ndarray) -> None:
    connected.sendall(share.data)


def _receive(connected: socket.socket, share: np.ndarray) -> None:
    view, at = share.data, 0
    while at < len(view):
        at += connected.recv_into(view[at:], min(SOCKET_BYTES, len(view) - at))


def start_child(target: Any, *arguments: Any) -> tuple[Connection, Any]:
    """A process of its own and a pipe to it; it gets the other end as its first argument."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return mine, process
