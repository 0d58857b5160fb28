"""Compiles what takes digests, keeps the library, and calls it."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine_core.compiled_library import COMPILERS, Sources, build_library, load_library
from kv_transfer.digester import Digester, PlainDigester, Rows

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

Digest = Callable[[int, int, int | None, int, int, int, int, int, bool, int], None]


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
    return CompiledDigester(digest)


class CompiledDigester:
    """Reads the bytes once, copying or not; rows that the library is not made for are left to the definition."""

    def __init__(self, digest: Digest) -> None:
        self._digest = digest
        self._plain = PlainDigester()

    def digests(self, rows: Rows, places: Sequence[int]) -> tuple[int, ...]:
        """See Digester."""
        if not _suit(rows):
            return self._plain.digests(rows, places)
        wanted = np.array(places, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(rows[0]):
            raise IndexError(f"blocks {list(places)} of {len(rows[0])}")
        return self._call(rows, None, wanted, streams=False)

    def copy(self, rows: Rows, targets: Rows, *, streams: bool) -> tuple[int, ...]:
        """See Digester."""
        shapes = {(len(each), *(row.shape for row in each)) for each in (rows, targets)}
        if len(shapes) > 1:
            raise ValueError(f"rows and targets of other shapes: {shapes}")
        if not (_suit(rows) and _suit(targets)):
            return self._plain.copy(rows, targets, streams=streams)
        return self._call(rows, targets, np.arange(len(rows[0])), streams=streams)

    def _call(self, rows: Rows, targets: Rows | None, places: np.ndarray, *, streams: bool) -> tuple[int, ...]:
        found = np.empty(len(places), np.uint64)
        sources, written = _addresses(rows), None if targets is None else _addresses(targets)
        self._digest(
            sources.ctypes.data,
            rows[0].strides[0],
            None if written is None else written.ctypes.data,
            0 if targets is None else targets[0].strides[0],
            len(rows),
            rows[0].shape[1],
            places.ctypes.data,
            len(places),
            streams,
            found.ctypes.data,
        )
        return tuple(found.tolist())


def _suit(rows: Rows) -> bool:
    """Whether they are of a size that the library takes, and lie alike."""
    first = rows[0]
    shape, strides = first.shape, first.strides
    return (
        shape[1] % _STRIPE_BYTES == 0
        and shape[1] * len(rows) >= _MIN_BLOCK_BYTES
        and strides[1] == 1
        and all(row.shape == shape and row.strides == strides for row in rows)
    )


def _addresses(rows: Rows) -> np.ndarray:
    return np.array([row.__array_interface__["data"][0] for row in rows], np.uint64)
