"""What `baton bench kv` compares with: memcpy, raw sockets, and other libraries' transfers."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

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
        self._digester.digests(rows, range(n))
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
        for at in range(0, n, each):
            part = [row[at : at + each] for row in rows]
            begin, count = at * layout.block_bytes, len(part[0])
            landed = payload_rows(self._target[begin : begin + count * layout.block_bytes], count, layout)
            copied = self._digester.copy(part, landed, streams=True)
            assert copied == self._digester.digests(landed, range(count))
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
    """

    def __init__(self, num_connections: int, source: np.ndarray) -> None:
        self.name = f"raw sockets x{num_connections}"
        self._source = source
        self._cpu_s = 0.0
        with socket.create_server(("127.0.0.1", 0)) as listener:
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


class JaxTransfer:
    """`jax.experimental.transfer` between two processes: pulled as 16 arrays over 4 channels, its best form on hosts.

    Args:
        source: not used: the other process makes its own.
    """

    def __init__(self, source: np.ndarray) -> None:
        self.name = "jax.experimental.transfer"
        self._pipe, self._process = start_child(_offer_jax)
        address = self._pipe.recv()
        self._pull_pipe, self._pull_process = start_child(_pull_jax, address)
        self._pull_pipe.recv()
        self._number = 0

    def move(self, num_bytes: int) -> float:
        """Pull arrays that wait at the other end."""
        self._number += 1
        self._pipe.send((self._number, num_bytes))
        self._pipe.recv()
        self._pull_pipe.send((self._number, num_bytes))
        return float(self._pull_pipe.recv())

    def cpu_s(self) -> float:
        """Of both ends."""
        total = 0.0
        for pipe in (self._pipe, self._pull_pipe):
            pipe.send((0, 0))
            total += float(pipe.recv())
        return total

    def close(self) -> None:
        """End both processes."""
        for pipe, process in ((self._pull_pipe, self._pull_process), (self._pipe, self._process)):
            process.kill()
            process.join()
            pipe.close()


JAX_ARRAYS = 16


def _jax_server() -> Any:
    transfer = importlib.import_module("jax.experimental.transfer")
    jax = importlib.import_module("jax")
    client = jax.devices("cpu")[0].client
    return jax, transfer.start_transfer_server(client, "127.0.0.1:0", ["127.0.0.1:0"] * 4)


def _offer_jax(pipe: Connection) -> None:
    jax, server = _jax_server()
    pipe.send(server.address())
    used_s = 0.0
    while True:
        number, num_bytes = pipe.recv()
        if not number:
            pipe.send(time.process_time() - used_s)
            continue
        idle_s = time.process_time()
        arrays = [jax.numpy.ones(num_bytes // JAX_ARRAYS, jax.numpy.uint8) for _ in range(JAX_ARRAYS)]
        jax.block_until_ready(arrays)
        used_s += time.process_time() - idle_s
        server.await_pull(number, arrays)
        pipe.send("ready")


def _pull_jax(pipe: Connection, address: str) -> None:
    jax, server = _jax_server()
    connection = server.connect(address)
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    pipe.send("ready")
    idle_s = time.process_time()
    while True:
        number, num_bytes = pipe.recv()
        if not number:
            pipe.send(time.process_time() - idle_s)
            continue
        shape = jax.ShapeDtypeStruct((num_bytes // JAX_ARRAYS,), jax.numpy.uint8, sharding=place)
        start_s = time.monotonic()
        jax.block_until_ready(connection.pull(number, [shape] * JAX_ARRAYS))
        pipe.send(time.monotonic() - start_s)


def has(module: str) -> bool:
    """Whether an optional library is installed."""
    return importlib.util.find_spec(module) is not None


def start_child(target: Any, *arguments: Any) -> tuple[Connection, Any]:
    """A process of its own and a pipe to it; it gets the other end as its first argument."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return mine, process


class MooncakeEngine:
    """Mooncake's transfer engine over TCP, written to the other end in one call.

    Args:
        source: as many bytes as the largest move.
    """

    def __init__(self, source: np.ndarray) -> None:
        self.name = "Mooncake (TCP)"
        self._source = source
        self._pipe, self._process = start_child(_land_mooncake, len(source))
        self._target, self._address = self._pipe.recv()
        self._engine = _mooncake()
        _must_be_zero(self._engine.register_memory(source.ctypes.data, len(source)), "register_memory")
        self._cpu_s = 0.0

    def move(self, num_bytes: int) -> float:
        """Write to the other process's memory."""
        cpu_s, start_s = time.process_time(), time.monotonic()
        source = self._source.ctypes.data
        result = self._engine.transfer_sync_write(self._target, source, self._address, num_bytes)
        seconds = time.monotonic() - start_s
        self._cpu_s += time.process_time() - cpu_s
        _must_be_zero(result, "transfer_sync_write")
        return seconds

    def cpu_s(self) -> float:
        """Of both ends."""
        self._pipe.send("cpu")
        return self._cpu_s + float(self._pipe.recv())

    def close(self) -> None:
        """End the other process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _mooncake() -> Any:
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    _must_be_zero(engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""), "initialize")
    return engine


def _land_mooncake(pipe: Connection, num_bytes: int) -> None:
    engine = _mooncake()
    target = touched(num_bytes)
    _must_be_zero(engine.register_memory(target.ctypes.data, num_bytes), "register_memory")
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", target.ctypes.data))
    idle_s = time.process_time()
    while pipe.recv():
        pipe.send(time.process_time() - idle_s)


def _must_be_zero(result: int, name: str) -> None:
    if result:
        raise RuntimeError(f"{name} failed: {result}")


class NixlAgent:
    """NIXL's agents over UCX restricted to TCP, written to the other end in one transfer.

    Args:
        source: as many bytes as the largest move.
    """

    def __init__(self, source: np.ndarray) -> None:
        self.name = "NIXL (TCP)"
        self._pipe, self._process = start_child(_land_nixl, len(source))
        peer_metadata, self._target = self._pipe.recv()
        self._agent = _nixl("prefill")
        self._agent.register_memory([(source.ctypes.data, len(source), 0, "")], "DRAM")
        self._source = source.ctypes.data
        self._peer = self._agent.add_remote_agent(peer_metadata)
        self._cpu_s = 0.0

    def move(self, num_bytes: int) -> float:
        """Write to the other process's memory, polling until it is done."""
        cpu_s, start_s = time.process_time(), time.monotonic()
        local = self._agent.get_xfer_descs([(self._source, num_bytes, 0)], "DRAM")
        remote = self._agent.get_xfer_descs([(self._target, num_bytes, 0)], "DRAM")
        transfer = self._agent.initialize_xfer("WRITE", local, remote, self._peer, b"")
        state = self._agent.transfer(transfer)
        while state == "PROC":
            state = self._agent.check_xfer_state(transfer)
        seconds = time.monotonic() - start_s
        self._cpu_s += time.process_time() - cpu_s
        self._agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        return seconds

    def cpu_s(self) -> float:
        """Of both ends."""
        self._pipe.send("cpu")
        return self._cpu_s + float(self._pipe.recv())

    def close(self) -> None:
        """End the other process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _nixl(name: str) -> Any:
    os.environ["UCX_TLS"] = "tcp"  # read by the library itself; without it, it would take shared memory
    api = importlib.import_module("nixl._api")
    return api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))


def _land_nixl(pipe: Connection, num_bytes: int) -> None:
    agent = _nixl("decode")
    target = touched(num_bytes)
    agent.register_memory([(target.ctypes.data, num_bytes, 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), target.ctypes.data))
    idle_s = time.process_time()
    while pipe.recv():
        pipe.send(time.process_time() - idle_s)
