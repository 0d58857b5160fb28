"""Links slower than loopback, for `baton bench kv --link-gbit`: the kernel paces what a socket sends (Linux).

Loopback is as fast as the cores that copy; any real network is slower. Accepted sockets inherit the pace of their
listener, so that it is set there, for raw sockets as for Baton's, whose data plane listens in another process: its
listener is borrowed, and the transport runs as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_SO_MAX_PACING_RATE = 47
_PIDFD_GETFD = 438  # the system call, on every architecture


def pace(listener: socket.socket, gbit: float, num_connections: int) -> None:
    """Have the connections that `listener` will accept send `gbit` Gbit/s together, each its share."""
    bytes_per_s = int(gbit * 1e9 / 8 / num_connections)
    rate = bytes_per_s.to_bytes(ctypes.sizeof(ctypes.c_ulong), "little")
    listener.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate)


def listener_of(pid: int, port: int) -> socket.socket:
    """The socket with which a child process of ours listens on `port`, on a descriptor of our own.

    Raises:
        OSError: the system does not lend sockets of other processes, or that process does not listen there.
    """
    with _closing(os.pidfd_open(pid)) as process:
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = Path(f"/proc/{pid}/fd/{name}")
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(path).startswith("socket:"):
                    borrowed = socket.socket(fileno=_borrow(process, int(name)))
                    if _listens(borrowed, port):
                        return borrowed
                    borrowed.close()
    raise OSError(f"process {pid} does not listen on port {port}")


def _listens(borrowed: socket.socket, port: int) -> bool:
    if borrowed.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    is_listener = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return bool(is_listener) and borrowed.getsockname()[1] == port


def _borrow(process: int, descriptor: int) -> int:
    found = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, descriptor, 0)
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot borrow a socket of the data plane: {os.strerror(number)}")
    return int(found)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
