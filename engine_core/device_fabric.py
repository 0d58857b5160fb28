"""KV from device to device by `jax.experimental.transfer`; the contract is `kv_transfer.fabric`.

Known of that module, on CPU, jax 0.10 and 0.12: a pull from a peer that hangs, or of a number that is not registered,
never ends and has no deadline of its own, so that pulls run on threads that can be left behind; what is registered and
never pulled is kept for ever, so that withdrawing is pulling it oneself; shapes and dtypes are not compared.
"""

from __future__ import annotations

import importlib
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

_CHANNELS = 4
_NUMBER_BITS = 62
_SEEDS = (0x9E3779B1, 0x85EBCA77)


class BlockShape(Protocol):
    """What of `kv_transfer.layout.BlockLayout` is needed here."""

    @property
    def num_layers(self) -> int:
        """Layers."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(page_size, 2K, H)`."""

    @property
    def dtype(self) -> str:
        """Of keys and values."""


class JaxFabric:
    """Arrays of one device that other processes pull.

    Args:
        host: to listen on; there is no authentication on its ports, see `kv_transfer.fabric`.
        device: holds what is offered and what is pulled.
    """

    def __init__(self, host: str, device: jax.Device) -> None:
        transfer = importlib.import_module("jax.experimental.transfer")
        self._device = device
        self._server = transfer.start_transfer_server(device.client, f"{host}:0", [f"{host}:0"] * _CHANNELS)
        self._offered: dict[int, list[jax.ShapeDtypeStruct]] = {}
        self._own: Any = None

    @property
    def address(self) -> str:
        """Where peers pull from."""
        return str(self._server.address())

    def offer(self, layers: Sequence[np.ndarray | jax.Array]) -> tuple[int, tuple[int, ...]]:
        """Register blocks, per layer `[n, page_size, 2K, H]`: a random number and a digest of each block."""
        arrays = [jax.device_put(layer, self._device) for layer in layers]
        number = secrets.randbits(_NUMBER_BITS) + 1
        self._offered[number] = [self._spec(array.shape, array.dtype) for array in arrays]
        self._server.await_pull(number, arrays)
        return number, block_digests(arrays)

    def withdraw(self, numbers: Sequence[int]) -> None:
        """Free what was offered and not pulled. One that was pulled leaves a pull that never ends, and no memory."""
        for number in numbers:
            specs = self._offered.pop(number, None)
            if specs is not None:
                self._own = self._own or self._server.connect(self.address)
                self._own.pull(number, specs)

    def pulled(self, numbers: Sequence[int]) -> None:
        """The other end has them."""
        for number in numbers:
            self._offered.pop(number, None)

    def connect(self, address: str) -> JaxPeer:
        """A way to the process there."""
        return JaxPeer(self._server, address, self._spec)

    def _spec(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        place = jax.sharding.SingleDeviceSharding(self._device)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


@dataclass(frozen=True, slots=True, eq=False)
class Landed:
    """Blocks that were pulled: per layer `[n, page_size, 2K, H]`, and a digest per block."""

    layers: list[np.ndarray]
    digests: tuple[int, ...]


class JaxPeer:
    """One thread that connects and pulls: on TPU both belong on the same."""

    def __init__(self, server: Any, address: str, spec: Callable[..., jax.ShapeDtypeStruct]) -> None:
        self._server = server
        self._address = address
        self._spec = spec
        self._orders: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="device-pulls", daemon=True).start()

    def pull(self, number: int, n: int, layout: BlockShape, on_done: Callable[[Landed | Exception], None]) -> None:
        """Queue a pull; `on_done` is called on the thread."""
        specs = [self._spec((n, *layout.shape), jnp.dtype(layout.dtype))] * layout.num_layers

        def order(connection: Any) -> None:
            try:
                arrays = connection.pull(number, specs)
                digests = block_digests(arrays)
                layers = [np.asarray(array) for array in arrays]
            except (RuntimeError, ValueError) as error:  # jax's own is a RuntimeError
                on_done(error)
                return
            on_done(Landed(layers, digests))

        self._orders.put(order)

    def close(self) -> None:
        """End the thread behind the pulls at hand."""
        self._orders.put(None)

    def _run(self) -> None:
        connection = None
        while (order := self._orders.get()) is not None:
            connection = connection or self._server.connect(self._address)
            order(connection)


def block_digests(layers: Sequence[jax.Array]) -> tuple[int, ...]:
    """One u64 per block, summed where the arrays are: any single bit that flips changes it.

    Two sums of all words, modulo 2^32, each word times an odd number that depends on its place and layer.

    Args:
        layers: per layer `[n, ...]`, of items of 1, 2 or 4 bytes.
    """
    low, high = np.asarray(_sums(tuple(layers))).astype(np.uint64)
    return tuple(int(value) for value in low | high << np.uint64(32))


@jax.jit
def _sums(layers: tuple[jax.Array, ...]) -> jax.Array:
    """`[2, n]` u32."""
    total = jnp.zeros((2, layers[0].shape[0]), jnp.uint32)
    for number, layer in enumerate(layers):
        unsigned = jnp.dtype(f"uint{8 * layer.dtype.itemsize}")
        words = jax.lax.bitcast_convert_type(layer, unsigned).reshape(layer.shape[0], -1).astype(jnp.uint32)
        places = jnp.arange(words.shape[1], dtype=jnp.uint32) + jnp.uint32(number * words.shape[1])
        factors = jnp.stack([_mixed(places * jnp.uint32(seed)) | 1 for seed in _SEEDS])
        total += (words * factors[:, None]).sum(-1, dtype=jnp.uint32)
    return total


def _mixed(value: jax.Array) -> jax.Array:
    """A permutation of u32 (Murmur3's finalizer)."""
    value = (value ^ value >> 16) * jnp.uint32(0x85EBCA6B)
    value = (value ^ value >> 13) * jnp.uint32(0xC2B2AE35)
    return value ^ value >> 16
