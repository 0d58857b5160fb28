"""What a block looks like on the wire, and the fingerprint that two workers must share before they exchange one."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cached_property
from typing import Any, Protocol

import ml_dtypes
import msgspec
import numpy as np

from engine_core.errors import ConfigError, ProtocolError
from engine_core.kv_scales import KvScales
from engine_core.messages import PROTOCOL_VERSION
from engine_core.models.spec import ModelSpec

MAX_SIZE = 1 << 16
"""Of any field of a layout that a peer names."""
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


class CacheShape(Protocol):
    """What of `engine_core.kv_cache.CacheLayout` reaches the wire; that module imports jax, this package never does."""

    @property
    def num_layers(self) -> int:
        """Layers."""

    @property
    def page_size(self) -> int:
        """Tokens per page."""

    @property
    def num_kv_heads(self) -> int:
        """K."""

    @property
    def head_dim(self) -> int:
        """H."""

    @property
    def dtype(self) -> str:
        """float32, bfloat16 or float8_e4m3fn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Logical heads, unpadded: per layer `[page_size, 2K, H]`, heads in the order K0, V0, K1, V1, ...

    Whole rows travel even where the last block of a prompt is partial: the receiver knows the prompt's length. Where
    several hosts hand one block over, each has a layout of its own heads (`part`).

    Attributes:
        first_kv_head: number of the first of the `num_kv_heads`.
        units: what 1 stands for where the dtype is float8, or would where it is not: `[num_layers, 2K]` f32; empty: 1.
            All workers of a model have the same (the fingerprint says so), so that the wire does not carry them.
    """

    num_layers: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # float32 | bfloat16 | float8_e4m3fn
    first_kv_head: int = 0
    units: bytes = b""

    def __post_init__(self) -> None:
        """Refuse what has no wire form."""
        if self.dtype not in _DTYPES:
            raise ConfigError(f"no wire format for KV of dtype {self.dtype!r}")

    @classmethod
    def of(cls, cache: CacheShape, scales: KvScales | None) -> BlockLayout:
        """The wire layout of a device cache; `scales` are the model's."""
        return cls(
            num_layers=cache.num_layers,
            page_size=cache.page_size,
            num_kv_heads=cache.num_kv_heads,
            head_dim=cache.head_dim,
            dtype=cache.dtype,
            units=b"" if scales is None else np.array(scales, np.float32).tobytes(),
        )

    @classmethod
    def from_wire(cls, fields: tuple[int, int, int, int, str]) -> BlockLayout:
        """Undo `wire_fields`.

        Raises:
            ProtocolError: no cache has such a layout.
        """
        *sizes, dtype = fields
        if dtype not in _DTYPES or not all(0 < size <= MAX_SIZE for size in sizes):
            raise ProtocolError(f"a layout of {fields}")
        layers, page_size, heads, head_dim = sizes
        return cls(num_layers=layers, page_size=page_size, num_kv_heads=heads, head_dim=head_dim, dtype=dtype)

    @property
    def wire_fields(self) -> tuple[int, int, int, int, str]:
        """As `KvHello` carries it; which heads they are is in each `KvBlocks`."""
        return (self.num_layers, self.page_size, self.num_kv_heads, self.head_dim, self.dtype)

    def part(self, first_kv_head: int, num_kv_heads: int) -> BlockLayout:
        """The layout of some of the heads."""
        begin = 2 * (first_kv_head - self.first_kv_head)
        units = self.layer_units
        own = b"" if units is None else units[:, begin : begin + 2 * num_kv_heads].tobytes()
        return dataclasses.replace(self, first_kv_head=first_kv_head, num_kv_heads=num_kv_heads, units=own)

    @property
    def layer_units(self) -> np.ndarray | None:
        """`units` as `[num_layers, 2K]`; None: all 1."""
        return np.frombuffer(self.units, np.float32).reshape(self.num_layers, -1) if self.units else None

    @property
    def heads(self) -> tuple[int, int]:
        """Range of KV heads, as `KvBlocks` carries it."""
        return (self.first_kv_head, self.first_kv_head + self.num_kv_heads)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of host arrays."""
        return _DTYPES[self.dtype]

    @property
    def shape(self) -> tuple[int, int, int]:
        """One block of one layer."""
        return (self.page_size, 2 * self.num_kv_heads, self.head_dim)

    @cached_property
    def layer_bytes(self) -> int:
        """One block of one layer."""
        return self.page_size * 2 * self.num_kv_heads * self.head_dim * self.numpy_dtype.itemsize

    @cached_property
    def block_bytes(self) -> int:
        """One block of all layers."""
        return self.num_layers * self.layer_bytes


def fingerprint(spec: ModelSpec, revision: str, layout: BlockLayout) -> str:
    """Sixteen hex digits over all that two workers must agree on: model, revision, heads, protocol.

    Page size and dtype of the cache may differ: the sender converts (`repaging`).

    Args:
        revision: names the weights, and in strict numerics the bits they give; what must not pair must differ in it.
    """
    fields = {
        "spec": dataclasses.asdict(spec),
        "revision": revision,
        "layout": (layout.num_layers, layout.num_kv_heads, layout.head_dim),
        "protocol": PROTOCOL_VERSION,
    }
    return hashlib.blake2b(msgspec.json.encode(fields, order="sorted"), digest_size=8).hexdigest()
