"""Hand-offs between two processes, for `baton bench kv`: the endpoints that workers use, without the workers."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from benchmarks.kv_baselines import start_child
from benchmarks.kv_link import listener_of, pace
from engine_core.errors import BatonError
from engine_core.messages import PeerAddress, TokenChunk
from kv_transfer.base import Layers
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.layout import BlockLayout
from kv_transfer.plane_receiver import PlaneKvReceiver
from kv_transfer.plane_sender import PlaneKvSender
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.sender import NetKvSender
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.wire import Transport

LEASE_S = 60.0
Result = TypeVar("Result")


class Way(Protocol):
    """One way to move bytes from this process to another, or within it."""

    name: str

    def move(self, num_bytes: int) -> float:
        """Seconds until the last byte could be used at the other end."""
        ...

    def cpu_s(self) -> float:
        """CPU seconds that all processes of this way have used so far."""
        ...

    def close(self) -> None:
        """End the other process."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """To the decode process: ask for a request's blocks, or (`name` empty) say how much CPU time was used."""

    name: str
    num_blocks: int


class HandOff:
    """A prefill worker's sender here, a decode worker's receiver in another process.

    Args:
        planes: with a data-plane process beside each, as workers have; else the endpoints do all work themselves.
        library: that takes digests, see TransferOptions.
        name: in the table.
        transport: the only one both can do.
        layout: of a block.
        source: u8, as many bytes as the largest hand-off.
        num_connections: over TCP.
        link_gbit: what they may send together, in Gbit/s, for planes over TCP; None: as fast as it goes.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        layout: BlockLayout,
        source: np.ndarray,
        num_connections: int,
        *,
        planes: bool,
        library: Path | None,
        link_gbit: float | None = None,
    ) -> None:
        self.name = name
        self._layout = layout
        self._numbers = itertools.count()
        self._ticketed = threading.Event()
        n = len(source) // layout.block_bytes
        rows = source[: n * layout.block_bytes].view(layout.numpy_dtype)
        self._layers = list(rows.reshape(layout.num_layers, n, *layout.shape))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        options = TransferOptions(
            transports=(transport,),
            num_connections=num_connections,
            arena_bytes=256 << 20,
            encrypts=False,
            library=library,
        )
        self._sender = self._call(self._open(options, planes=planes))
        self.port = self._call(self._sender.start("127.0.0.1", 0))
        if link_gbit is not None and isinstance(self._sender, PlaneKvSender):
            with listener_of(self._sender.plane_pid, self.port) as listener:
                pace(listener, link_gbit, num_connections)
        self._pipe, self._process = start_child(_decode, self.port, layout, options, planes)
        self._sending_cpu_s = 0.0
        self._pids = [self._pipe.recv()]
        if isinstance(self._sender, PlaneKvSender):
            self._pids.append(self._sender.plane_pid)

    def move(self, num_bytes: int) -> float:
        """One hand-off: from the moment the blocks are on the host until decode has verified the last of them."""
        name = f"r{next(self._numbers)}"
        n = num_bytes // self._layout.block_bytes
        self._ticketed.clear()
        self._sender.offer(name, 0, LEASE_S)
        self._pipe.send(Order(name, n))
        assert self._ticketed.wait(10), "no ticket"
        layers = [layer[:n] for layer in self._layers]
        cpu_s, start_s = time.process_time(), time.monotonic()
        self._sender.send_blocks(name, 0, range(n), layers)
        self._sender.finish(name, 0, TokenChunk(name, 0, 0, [1]))
        end_s = self._pipe.recv()
        if isinstance(end_s, str):
            raise RuntimeError(end_s)
        self._sending_cpu_s += time.process_time() - cpu_s
        return float(end_s) - start_s

    def whole_s(self, num_blocks: int) -> float:
        """The same from the moment decode asks, ticket and all."""
        name = f"r{next(self._numbers)}"
        layers = [layer[:num_blocks] for layer in self._layers]
        self._sender.offer(name, 0, LEASE_S)
        self._sender.send_blocks(name, 0, range(num_blocks), layers)
        self._sender.finish(name, 0, TokenChunk(name, 0, 0, [1]))
        start_s = time.monotonic()
        self._pipe.send(Order(name, num_blocks))
        return float(self._pipe.recv()) - start_s

    def cpu_s(self) -> float:
        """Of this process while blocks were on the way, and of its plane and the other end altogether."""
        self._pipe.send(Order("", 0))
        return self._sending_cpu_s + float(self._pipe.recv()) + sum(process_cpu_s(pid) for pid in self._pids if pid)

    def close(self) -> None:
        """End the other process."""
        self._pipe.close()
        self._process.join()
        self._call(self._sender.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # SenderEvents

    def on_ticket(self, ticket: Ticket) -> None:
        """Decode has asked."""
        self._ticketed.set()

    def on_cancel(self, request_id: str, epoch: int, error: BatonError) -> None:
        """Decode is told too."""

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self, options: TransferOptions, *, planes: bool) -> NetKvSender | PlaneKvSender:
        identity = _identity("prefill", self._layout)
        if planes:
            return PlaneKvSender(identity, None, self, options)
        return NetKvSender(identity, None, self, 4 << 30, options)


class _Decode:
    """Orders in, times out; blocks are dropped as soon as they are verified."""

    def __init__(
        self, pipe: Connection, port: int, layout: BlockLayout, options: TransferOptions, planes: bool
    ) -> None:
        self._pipe = pipe
        self._address = PeerAddress("127.0.0.1", 0, port)
        self._serials = itertools.count(1)
        kind = PlaneKvReceiver if planes else NetKvReceiver
        self._receiver = kind(_identity("decode", layout), None, self, options)
        self._over = asyncio.Event()
        self._idle_s = 0.0

    async def run(self) -> None:
        pid = 0
        if isinstance(self._receiver, PlaneKvReceiver):
            await self._receiver.start()
            pid = self._receiver.plane_pid
        self._pipe.send(pid)
        self._idle_s = time.process_time()
        asyncio.get_running_loop().add_reader(self._pipe, self._on_order)
        await self._over.wait()
        await self._receiver.close()

    def _on_order(self) -> None:
        try:
            order: Order = self._pipe.recv()
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._pipe)
            self._over.set()
            return
        if not order.name:
            self._pipe.send(time.process_time() - self._idle_s)
            return
        landing = tuple(Landing(index, index + 1) for index in range(order.num_blocks))
        self._receiver.request(
            self._address, Ticket(order.name, 0, next(self._serials), landing, round(LEASE_S * 1000))
        )

    # ReceiverEvents

    def on_blocks(
        self, request_id: str, epoch: int, block_indices: Sequence[int], layers: Layers, generations: Sequence[int]
    ) -> None:
        pass

    def on_done(self, request_id: str, epoch: int, first_token: TokenChunk, lost: Sequence[int]) -> None:
        self._pipe.send(time.monotonic())

    def on_failed(self, request_id: str, epoch: int, error: BatonError) -> None:
        self._pipe.send(f"{type(error).__name__}: {error}")


def _decode(pipe: Connection, port: int, layout: BlockLayout, options: TransferOptions, planes: bool) -> None:
    async def run() -> None:
        await _Decode(pipe, port, layout, options, planes).run()

    asyncio.run(run())


def process_cpu_s(pid: int) -> float:
    """CPU seconds of another process so far, to within a clock tick."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _identity(worker_id: str, layout: BlockLayout) -> KvIdentity:
    return KvIdentity(worker_id=worker_id, incarnation=1, fingerprint="bench", layout=layout)
