"""Other libraries' transfers, for `baton bench kv`; each takes part where it is installed.

NIXL without CUDA: `pip install --no-deps nixl nixl-cu12`. Mooncake: `pip install --no-deps
mooncake-transfer-engine-non-cuda`, which needs Debian's libibverbs1, libnuma1 and libcurl4.
Last run with NIXL 1.5.2 (nixl-cu12 1.5.1) and Mooncake 0.3.13.post1, Python 3.11, in a virtual machine without RDMA.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.kv_baselines import start_child, touched


def has(module: str) -> bool:
    """Whether an optional library is installed."""
    return importlib.util.find_spec(module) is not None


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

    Both are processes of their own, which stand still when it is not their turn: an agent polls even when it is idle,
    half a core for the two.

    Args:
        source: as many bytes as the largest move; the writing process makes its own.
    """

    def __init__(self, source: np.ndarray) -> None:
        self.name = "NIXL (TCP)"
        self._pipe, self._process = start_child(_land_nixl, len(source))
        self._write_pipe, self._write_process = start_child(_write_nixl, len(source), *self._pipe.recv())
        self._write_pipe.recv()
        self._let(signal.SIGSTOP)

    def move(self, num_bytes: int) -> float:
        """Write to the other process's memory, polling until it is done."""
        self._let(signal.SIGCONT)
        self._write_pipe.send(num_bytes)
        seconds, state = self._write_pipe.recv()
        self._let(signal.SIGSTOP)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        return float(seconds)

    def cpu_s(self) -> float:
        """Of both ends, polling included."""
        self._let(signal.SIGCONT)
        total = 0.0
        for pipe in (self._pipe, self._write_pipe):
            pipe.send(0)
            total += float(pipe.recv())
        self._let(signal.SIGSTOP)
        return total

    def close(self) -> None:
        """End both processes."""
        for pipe, process in ((self._write_pipe, self._write_process), (self._pipe, self._process)):
            process.kill()
            process.join()
            pipe.close()

    def _let(self, number: signal.Signals) -> None:
        for process in (self._process, self._write_process):
            os.kill(process.pid, number)


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
    while True:
        pipe.recv()
        pipe.send(time.process_time() - idle_s)


def _write_nixl(pipe: Connection, num_bytes: int, peer_metadata: bytes, target: int) -> None:
    agent = _nixl("prefill")
    source = touched(num_bytes)
    agent.register_memory([(source.ctypes.data, num_bytes, 0, "")], "DRAM")
    peer = agent.add_remote_agent(peer_metadata)
    pipe.send("ready")
    idle_s = time.process_time()
    while True:
        num_bytes = pipe.recv()
        if not num_bytes:
            pipe.send(time.process_time() - idle_s)
            continue
        start_s = time.monotonic()
        local = agent.get_xfer_descs([(source.ctypes.data, num_bytes, 0)], "DRAM")
        remote = agent.get_xfer_descs([(target, num_bytes, 0)], "DRAM")
        transfer = agent.initialize_xfer("WRITE", local, remote, peer, b"")
        state = agent.transfer(transfer)
        while state == "PROC":
            state = agent.check_xfer_state(transfer)
        pipe.send((time.monotonic() - start_s, state))
        agent.release_xfer_handle(transfer)
