"""A worker's data-plane process, and the channel from each of its ends to it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from engine_core.errors import ConfigError
from engine_core.messages import Message
from kv_transfer.channel import Channel
from kv_transfer.commands import Commands
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.plane_wire import (
    PlaneReady,
    PlaneStart,
    to_worker,
)

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0


class PlaneProcess:
    """The other process. It ends when all who talk to it have hung up; it starts when the first connects.

    Args:
        num_ends: who will connect: a sender, a receiver, or both.
    """

    def __init__(self, num_ends: int = 1) -> None:
        self._num_ends = num_ends
        self._free: list[socket.socket] = []
        self.popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process, once it has been started."""
        assert self.popen is not None
        return self.popen.pid

    def connect(self) -> socket.socket:
        """One end; to be called `num_ends` times."""
        if self.popen is None:
            pairs = [socket.socketpair() for _ in range(self._num_ends)]
            self._free = [mine for mine, _ in pairs]
            self.popen = _spawn([theirs for _, theirs in pairs])
            for _, theirs in pairs:
                theirs.close()
        return self._free.pop()

    async def leave(self) -> None:
        """An end was closed; whoever closes the last one waits for the end of the process."""
        self._num_ends -= 1
        if not self._num_ends:
            await self.end()

    async def end(self) -> None:
        """No further end will be connected; the others have been closed, or their owner is about to fail."""
        for mine in self._free:
            mine.close()
        self._free.clear()
        assert self.popen is not None
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, self.popen.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            await loop.run_in_executor(None, self.popen.wait)


class PlaneListener(Protocol):
    """The endpoint over a plane."""

    def on_message(self, message: Any) -> None:
        """From the plane."""

    def on_lost(self) -> None:
        """The plane is gone."""


class PlaneLink:
    """A channel to the other process."""

    def __init__(self, listener: PlaneListener, process: PlaneProcess | None) -> None:
        self._listener = listener
        self._shared = process
        self._process: PlaneProcess
        self._ready: asyncio.Future[PlaneReady]
        self._channel: Channel
        self._commands: Commands
        self._is_closing = False

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def start(
        self, identity: KvIdentity, secret: bytes | None, options: TransferOptions, host: str, port: int
    ) -> int:
        """Connect to the process; returns the port on which it listens."""
        loop = asyncio.get_running_loop()
        self._process = self._shared or PlaneProcess()
        mine = self._process.connect()
        self._ready = loop.create_future()
        self._commands = Commands(mine)
        make = lambda: Channel(to_worker, lambda channel: None, self._on_message, self._on_closed)  # noqa: E731
        _, self._channel = await loop.create_connection(make, sock=mine)
        self.send(
            PlaneStart(
                identity.worker_id,
                identity.incarnation,
                identity.fingerprint,
                dataclasses.asdict(identity.layout),
                secret,
                host,
                port,
                tuple(options.transports),
                options.num_connections,
                options.arena_bytes,
                options.encrypts,
                str(options.library or ""),
            )
        )
        try:
            ready = await asyncio.wait_for(self._ready, START_TIMEOUT_S)
        except TimeoutError:
            ready = PlaneReady(0, f"the data plane did not start within {START_TIMEOUT_S} s")
        if ready.problem:
            self._hang_up()
            await self._process.end()
            raise ConfigError(ready.problem)
        return ready.port

    def send(self, message: Message) -> None:
        """On any thread."""
        self._commands.send(message)

    async def close(self) -> None:
        """Hang up, and wait for the end of the process where nobody else talks to it."""
        self._hang_up()
        await self._process.leave()

    def _hang_up(self) -> None:
        self._is_closing = True
        self._commands.close()
        self._channel.close()

    def _on_message(self, channel: Channel, message: Any) -> None:
        if isinstance(message, PlaneReady) and not self._ready.done():
            self._ready.set_result(message)
        else:
            self._listener.on_message(message)

    def _on_closed(self, channel: Channel, error: Exception | None) -> None:
        self._commands.close()
        if not self._ready.done():
            self._ready.set_result(PlaneReady(0, "the data plane ended while it started"))
        if not self._is_closing:
            logger.error("the data plane is gone (%s)", error or "it hung up")
            self._listener.on_lost()


def _spawn(connected: list[socket.socket]) -> subprocess.Popen[bytes]:
    """The process whose ends of socket pairs `connected` are; it must find this package where we found it."""
    descriptors = [each.fileno() for each in connected]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "kv_transfer.plane_process", *map(str, descriptors)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
