"""A TCP proxy that does to a connection what networks do, and worse; switchable while it runs. Needs no root."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from benchmarks.chaos.frames import Cutter, Uncut

READ_BYTES = 64 << 10
MAX_UNDER_WAY = 256  # pieces of one way of one connection: a slow way pushes back
DRIP_S = 0.05  # between two drops of a dripping way
RESET = struct.pack("ii", 1, 0)  # linger not at all: RST instead of FIN
POLL_S = 0.02  # a way that holds looks this often whether it still does


@dataclass(frozen=True, kw_only=True, slots=True)
class Weather:
    """What becomes of the pieces of one way. Shares are of pieces, 0 to 1; each is drawn for itself.

    Attributes:
        delay_s: each piece comes so much later.
        bytes_per_s: no more than that gets through; 0: any number.
        lose, double, swap: share that is dropped, sent twice, sent behind its successor.
        flip: share in which one bit is changed.
        holds: nothing gets through, and nobody is told (half-open); what came meanwhile follows when it ends.
    """

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    lose: float = 0.0
    double: float = 0.0
    swap: float = 0.0
    flip: float = 0.0
    holds: bool = False


FAIR = Weather()


@dataclass(slots=True)
class Counts:
    """What a proxy did."""

    connections: int = 0
    pieces: int = 0
    lost: int = 0
    doubled: int = 0
    swapped: int = 0
    flipped: int = 0
    cut: int = 0


class FaultProxy:
    """Listens in the place of one server.

    Args:
        host, port: of that server.
        rng: decides which pieces are harmed.
        cutter: makes a new cutter for each way of each connection.

    Attributes:
        to_server, to_client: assign another `Weather` at any time.
        counts: what it did so far.
        port: where it listens, once started.
    """

    def __init__(self, host: str, port: int, rng: random.Random, cutter: Callable[[], Cutter] = Uncut) -> None:
        self.to_server = self.to_client = FAIR
        self.counts = Counts()
        self.port = 0
        self._target = (host, port)
        self._rng = rng
        self._cutter = cutter
        self._is_closing = False
        self._server: asyncio.Server
        self._connections: set[_Connection] = set()

    async def start(self) -> int:
        """Listen on loopback; returns the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    @property
    def num_open(self) -> int:
        """Connections that go through it now."""
        return len(self._connections)

    def cut(self) -> None:
        """Reset every connection; new ones are welcome."""
        for connection in list(self._connections):
            self.counts.cut += 1
            connection.reset()

    async def close(self) -> None:
        """Stop listening, and cut what is open."""
        self._is_closing = True
        self._server.close()
        self.cut()
        await asyncio.sleep(0)  # for those accepted just now
        while self._connections:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        self.counts.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            connection.far = far_writer
            if self._is_closing:
                return connection.reset()
            ways = (
                self._pass_on(reader, far_writer, lambda: self.to_server),
                self._pass_on(far_reader, writer, lambda: self.to_client),
            )
            connection.tasks = [asyncio.ensure_future(way) for way in ways]
            await asyncio.wait(connection.tasks, return_when=asyncio.FIRST_EXCEPTION)
        except OSError:
            connection.reset()
        finally:
            await connection.close()
            self._connections.discard(connection)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, weather: Callable[[], Weather]
    ) -> None:
        """One way, until its sender has nothing more to say; an end that vanished ends the other way, too."""
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(MAX_UNDER_WAY)

        async def write() -> None:
            while (item := await under_way.get()) is not None:
                due, piece = item
                await asyncio.sleep(max(0.0, due - loop.time()))
                while weather().holds:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
                await _drip(writer, piece, weather)
            writer.write_eof()

        writing = asyncio.ensure_future(write())
        try:
            async for piece in self._harmed(reader, weather):
                put = asyncio.ensure_future(under_way.put((loop.time() + weather().delay_s, piece)))
                await asyncio.wait({put, writing}, return_when=asyncio.FIRST_COMPLETED)
                if writing.done():
                    put.cancel()
                    break
            else:
                await under_way.put(None)
            await writing
        finally:
            writing.cancel()

    async def _harmed(self, reader: asyncio.StreamReader, weather: Callable[[], Weather]) -> AsyncIterator[bytes]:
        """The pieces as they come through."""
        cutter, counts, rng = self._cutter(), self.counts, self._rng
        kept: list[bytes] = []
        while data := await reader.read(READ_BYTES):
            for piece in cutter.feed(data):
                now = weather()
                counts.pieces += 1
                if rng.random() < now.lose:
                    counts.lost += 1
                    continue
                if rng.random() < now.flip:
                    counts.flipped += 1
                    piece = flipped(piece, rng)
                if not kept and rng.random() < now.swap:
                    counts.swapped += 1
                    kept.append(piece)
                    continue
                yield piece
                if rng.random() < now.double:
                    counts.doubled += 1
                    yield piece
                while kept:
                    yield kept.pop()
        while kept:
            yield kept.pop()


class _Connection:
    """Both sockets, and the tasks between them."""

    def __init__(self, near: asyncio.StreamWriter) -> None:
        self.near = near
        self.far: asyncio.StreamWriter | None = None
        self.tasks: list[asyncio.Future[None]] = []

    def reset(self) -> None:
        """Both ends hear of it at once."""
        for task in self.tasks:
            task.cancel()
        for writer in (self.near, self.far):
            if writer is not None and not writer.is_closing():
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.transport.abort()

    async def close(self) -> None:
        """What both ends have ended is closed in order, all else is reset."""
        if not all(task.done() and not task.cancelled() and task.exception() is None for task in self.tasks):
            self.reset()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for writer in (self.near, self.far):
            if writer is not None:
                writer.close()
        for writer in (self.near, self.far):
            if writer is not None:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


async def _drip(writer: asyncio.StreamWriter, piece: bytes, weather: Callable[[], Weather]) -> None:
    """Write a piece, as fast as the way is at each moment."""
    while piece:
        rate = weather().bytes_per_s
        drop = max(1, int(rate * DRIP_S)) if rate else len(piece)
        writer.write(piece[:drop])
        await writer.drain()
        piece = piece[drop:]
        if piece:
            await asyncio.sleep(DRIP_S)


def flipped(piece: bytes, rng: random.Random) -> bytes:
    """One bit differs."""
    changed = bytearray(piece)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)
