"""What a worker tells its data plane, from whichever thread has something to say.

The calling thread writes to the socket itself. Through the event loop, each command would wait until that thread gives
the interpreter up: an engine thread that copies or dispatches keeps it for milliseconds at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading

from engine_core.messages import Message
from kv_transfer.framing import frame
from kv_transfer.wire import encode_body


class Commands:
    """Frames, in the order of `send`. Construct on the event-loop thread, which sends what the socket has no room for.

    Args:
        connected: a socket that others may read from; what is written here goes through a descriptor of its own.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(fileno=os.dup(connected.fileno()))
        self._socket.setblocking(False)
        self._lock = threading.Lock()
        self._num_sent = 0
        self._waiting = bytearray()
        self._is_closed = False

    def send(self, message: Message) -> None:
        """On any thread; never waits. Dropped once closed or when nobody reads any more."""
        with self._lock:
            if self._is_closed:
                return
            self._waiting += frame(encode_body(message), self._num_sent)
            self._num_sent += 1
            if len(self._waiting) > (had := self._write()):
                del self._waiting[:had]
                with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
                    self._loop.call_soon_threadsafe(self._watch)
            else:
                self._waiting.clear()

    def close(self) -> None:
        """On the event loop; more than once is fine."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._loop.remove_writer(self._socket)
            self._socket.close()

    def _write(self) -> int:
        try:
            return self._socket.send(self._waiting)
        except BlockingIOError:
            return 0
        except OSError:  # whoever reads learns of it
            return len(self._waiting)

    def _watch(self) -> None:
        with self._lock:
            if not self._is_closed and self._waiting:
                self._loop.add_writer(self._socket, self._on_writable)

    def _on_writable(self) -> None:
        with self._lock:
            del self._waiting[: self._write()]
            if not self._waiting:
                self._loop.remove_writer(self._socket)
