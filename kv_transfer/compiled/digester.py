"""Compiles what takes digests, keeps the library, and calls it."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine_core.compiled_library import COMPILERS, Sources, build_library, load_library
from kv_transfer.digester import Digester, PlainDigester, PlainReader, Reader, Rows

logger = logging.getLogger(__name__)

_SOURCES = Sources(
    name="baton_kv",
    purpose="the copying of KV",
    otherwise="Python's libraries do it, in twice the time",
    files=(Path(__file__).parent / "hashing.cc",),
    headers=(),
    flags=(),
)
_STRIPE_BYTES = 64
_MIN_BLOCK_BYTES = 241  # shorter ones are hashed in other ways

Digest = Callable[..., None]
"""See `BatonDigest`."""


def build_digester(compile_cache: str) -> Path | None:
    """The library, compiled where it is not kept yet, in a second or two; it releases the interpreter's lock.

    Args:
        compile_cache: the directory beside whose other content it is kept; empty: nowhere.

    Returns:
        None where it is kept nowhere, where there is no compiler, or it fails; the log says why.
    """
    if not compile_cache:
        return None
    return build_library(_SOURCES, Path(compile_cache).expanduser() / "kv_transfer", COMPILERS)


def open_digester(library: Path | None) -> Digester:
    """Of a library that was built, or of none."""
    functions = load_library(_SOURCES, library, keeps_lock=False) if library is not None else None
    if functions is None:
        return PlainDigester()
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    digest = functions.BatonDigest
    digest.argtypes = (pointer, count, pointer, count, count, count, pointer, count, ctypes.c_bool, pointer)
    digest.restype = None
    prefers_streams = functions.BatonPrefersStreams
    prefers_streams.argtypes, prefers_streams.restype = (), ctypes.c_bool
    return CompiledDigester(digest, prefers_streams())


class CompiledDigester:
    """Its readers read the bytes once, copying or not; rows that the library is not made for it leaves to others."""

    def __init__(self, digest: Digest, prefers_streams: bool) -> None:
        self.prefers_streams = prefers_streams
        self._digest = digest

    def reader(self, rows: Rows) -> Reader:
        """See Digester."""
        source = _Rows.of(rows)
        return PlainReader(rows) if source is None else CompiledReader(self._digest, rows, source)


class CompiledReader:
    """Knows where the rows lie: to ask NumPy for the address of every layer takes longer than the rest of a call."""

    def __init__(self, digest: Digest, rows: Rows, source: _Rows) -> None:
        self._digest = digest
        self._rows = rows
        self._source = source

    def digests(self, places: Sequence[int]) -> tuple[int, ...]:
        """See Reader."""
        source, n = self._source, len(places)
        if n and not 0 <= min(places) <= max(places) < source.n:
            raise IndexError(f"blocks {list(places)} of {source.n}")
        found, wanted = (ctypes.c_uint64 * n)(), (ctypes.c_int64 * n)(*places)
        self._digest(source.addresses, source.stride, None, 0, *source.sizes, wanted, n, False, found)
        return tuple(found)

    def copy(self, first: int, targets: Rows, *, streams: bool) -> tuple[int, ...]:
        """See Reader."""
        source, target = self._source, _Rows.of(targets)
        if target is None:
            return PlainReader(self._rows).copy(first, targets, streams=streams)
        n, end = target.n, first + target.n
        if source.sizes != target.sizes or not 0 <= first <= end <= source.n:
            raise ValueError(f"rows of other shapes: {first} to {end} of {source}, {target}")
        found, places = (ctypes.c_uint64 * n)(), (ctypes.c_int64 * n)(*range(first, end))
        written = (target.addresses, target.stride)
        self._digest(source.addresses, source.stride, *written, *source.sizes, places, n, streams, found)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows as the library takes them.

    Attributes:
        addresses: of each layer's first.
        stride: from one block's row to the next one's.
        n: blocks.
        sizes: number of layers, bytes of a row.
    """

    addresses: ctypes.Array[ctypes.c_uint64]
    stride: int
    n: int
    sizes: tuple[int, int]

    @classmethod
    def of(cls, rows: Rows) -> _Rows | None:
        """None where they do not suit."""
        num_layers, first = len(rows), rows[0]
        shape, strides = first.shape, first.strides
        n, layer_bytes = shape
        if layer_bytes % _STRIPE_BYTES or layer_bytes * num_layers < _MIN_BLOCK_BYTES or strides[1] != 1:
            return None
        if isinstance(rows, np.ndarray):
            begin, step = _address(rows), rows.strides[0]
            addresses = [begin + layer * step for layer in range(num_layers)]
        elif all(row.shape == shape and row.strides == strides for row in rows):
            addresses = [_address(row) for row in rows]
        else:
            return None
        return cls((ctypes.c_uint64 * num_layers)(*addresses), strides[0], n, (num_layers, layer_bytes))


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
