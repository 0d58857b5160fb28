"""The paged KV cache on the device: its layout, creation, and the way in and out for whole pages.

A page (Kwon et al. 2023) holds `page_size` token places of one layer, in the layout of ragged paged attention v3 (jax
`pallas/ops/tpu/ragged_paged_attention`): `[page_size, align(2K, pack) / pack, pack, align(H, head_align)]`, K and V
interleaved on the head axis (K0, V0, K1, V1, ...), pack = 32 / bits of the dtype.

Heads that are narrower than a row of lanes (H 64 of 128) lie side by side in one, K0 K1, V0 V1, ..., where the heads of
each device fill whole rows and words: `CacheLayout.heads_per_row`. Only where they do not is a row padded.

Storage: bfloat16 on a CPU is held as uint16, the same bits: XLA:CPU scatters bfloat16 a hundred times slower than
integers in jax 0.10, and float8 as uint8 likewise. `to_storage` and `from_storage` are the only places that know.

float8_e4m3fn holds what keys and values are in units of their head (`kv_scales`; 1 where a checkpoint has none): beyond
448 units they are clipped, others are rounded to 4 significant bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from engine_core.errors import ConfigError
from engine_core.mesh import TENSOR, cache_axes, kv_copies, sharding

FLOAT8 = "float8_e4m3fn"
FLOAT8_MAX = 448.0
_STACKED_NDIM = 6  # of a scanned segment's array; 5 is one layer's
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, FLOAT8: 1}
_CPU_STORAGE = {"bfloat16": jnp.uint16, FLOAT8: jnp.uint8}


def _align(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheLayout:
    """Sizes of one model replica's cache, before it is split over a mesh.

    Attributes:
        num_layers: layers that hold KV.
        num_pages: pages of each layer; the ids are [0, num_pages).
        page_size: token places per page.
        num_kv_heads: K.
        head_dim: H, unpadded.
        dtype: "float32", "bfloat16" or "float8_e4m3fn", in the cache and on the wire.
        head_align: a row's length is a multiple of it; 128 on TPU, 1 elsewhere.
        tp: devices that the KV heads, and where they are fewer, copies of them, are split over.
    """

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    head_align: int
    tp: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes that no cache can have."""
        if self.dtype not in _ITEM_BYTES:
            raise ConfigError(f"cache dtype must be float32, bfloat16 or {FLOAT8}, not {self.dtype!r}")
        for name in ("num_layers", "num_pages", "page_size", "num_kv_heads", "head_dim", "head_align", "tp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cache {name} must be at least 1, not {getattr(self, name)}")
        if self.dtype == FLOAT8 and self.num_held_heads // self.tp % 2:
            raise ConfigError(
                f"cache.dtype {FLOAT8} holds two KV heads in a word: {self.num_held_heads} KV heads on tp {self.tp} "
                "devices are an odd number on each; use cache.dtype auto or another tp"
            )

    @property
    def pack(self) -> int:
        """Values of this dtype in 32 bits."""
        return 4 // _ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """One block of all layers on the wire: unpadded."""
        values = self.num_layers * self.page_size * 2 * self.num_kv_heads * self.head_dim
        return values * _ITEM_BYTES[self.dtype]

    def empty_pages(self, count: int) -> list[np.ndarray]:
        """Zeros as `gather_pages` would give them: per layer `[count, page_size, 2K, H]`."""
        shape = (count, self.page_size, 2 * self.num_kv_heads, self.head_dim)
        return [np.zeros(shape, jnp.dtype(self.dtype))] * self.num_layers

    @property
    def kv_copies(self) -> int:
        """How often a page holds each KV head, on as many devices; on the wire it is one."""
        return kv_copies(self.num_kv_heads, self.tp)

    @property
    def num_held_heads(self) -> int:
        """KV heads of a page, copies counted."""
        return self.num_kv_heads * self.kv_copies

    @property
    def heads_per_row(self) -> int:
        """KV heads side by side in a row, so that it has no padding; 1 where that cannot be."""
        fitting = self.head_align // self.head_dim
        words_are_whole = fitting and (2 * self.num_held_heads) % (fitting * self.pack * self.tp) == 0
        rows_are_whole = fitting and self.num_held_heads % (fitting * self.tp) == 0
        return fitting if words_are_whole and rows_are_whole and fitting * self.head_dim == self.head_align else 1

    @property
    def page_shape(self) -> tuple[int, int, int, int]:
        """`[page_size, align(2K / F, pack) / pack, pack, align(F * H, head_align)]`, F heads per row, copies in K."""
        heads = _align(2 * self.num_held_heads // self.heads_per_row, self.pack) // self.pack
        return (self.page_size, heads, self.pack, _align(self.heads_per_row * self.head_dim, self.head_align))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers, padding included."""
        return self.num_layers * math.prod(self.page_shape) * _ITEM_BYTES[self.dtype]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The cache of all layers. A step that takes one donates it.

    Attributes:
        layers: `[num_pages, *page_shape]` for each layer, or `[L, num_pages, *page_shape]` for each scanned segment.
        head_dim: H where a row is longer, else 0. Static; a function that returns new layers keeps it (`replace`).
        heads_per_row: see `CacheLayout`. Static.
        kv_copies: of each KV head, behind one another. Static too; it is 1 where rows hold several heads.
    """

    layers: tuple[jax.Array, ...]
    head_dim: int = field(default=0, metadata={"static": True})
    heads_per_row: int = field(default=1, metadata={"static": True})
    kv_copies: int = field(default=1, metadata={"static": True})


def create_cache(layout: CacheLayout, mesh: Mesh | None, stacked: bool) -> KVCache:
    """Make an empty (zero) cache, its KV heads split over the mesh's `tensor` axis.

    Args:
        layout: global sizes.
        mesh: None: the default device.
        stacked: one array of all layers (scanned segments) instead of one per layer.

    Raises:
        ConfigError: the KV heads do not divide by the tensor axis.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    storage = _CPU_STORAGE.get(layout.dtype) if platform == "cpu" else None
    dtype = jnp.dtype(layout.dtype if storage is None else storage)
    shape = (layout.num_pages, *layout.page_shape)
    if mesh is not None and layout.num_held_heads % mesh.shape[TENSOR]:
        raise ConfigError(f"{layout.num_held_heads} KV heads do not divide over tp = {mesh.shape[TENSOR]}")
    place = None if mesh is None else sharding(mesh, cache_axes(stacked))
    head_dim = layout.head_dim if layout.page_shape[-1] > layout.head_dim else 0
    shapes = [(layout.num_layers, *shape)] if stacked else [shape] * layout.num_layers
    layers = tuple(jnp.zeros(one, dtype, device=place) for one in shapes)
    return KVCache(layers, head_dim, layout.heads_per_row, layout.kv_copies)


def to_storage(values: jax.Array, storage: jax.typing.DTypeLike) -> jax.Array:
    """Convert logical values to the cache's storage dtype; bits where that is unsigned. float8 is clipped, not NaN."""
    if storage == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    if storage == jnp.uint8:
        return jax.lax.bitcast_convert_type(to_storage(values, jnp.float8_e4m3fn), jnp.uint8)
    if storage == jnp.float8_e4m3fn and values.dtype != storage:
        values = jnp.clip(values, -FLOAT8_MAX, FLOAT8_MAX)
    return values.astype(storage)


def from_storage(stored: jax.Array) -> jax.Array:
    """Undo `to_storage`: the logical dtype, bit for bit."""
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
    if stored.dtype == jnp.uint8:
        return jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn)
    return stored


def pack_heads(heads: jax.Array, head_shape: tuple[int, ...]) -> jax.Array:
    """Lay `[..., 2K, H]` logical heads out as `head_shape` = (2K / pack, pack, align(H)), zeros in the padding."""
    padding = [(0, 0)] * (heads.ndim - 1) + [(0, head_shape[-1] - heads.shape[-1])]
    return jnp.pad(heads, padding).reshape(*heads.shape[:-2], *head_shape)


def joined_heads(num_kv_heads: int, head_dim: int, page_shape: tuple[int, ...]) -> int:
    """Heads side by side in a row of these pages, `[page_size, words, pack, width]`; 1 where rows hold one."""
    _, words, pack, width = page_shape
    fitting = width // head_dim
    whole = fitting * words * pack == 2 * num_kv_heads and fitting * head_dim == width
    return fitting if whole else 1


def join_heads(heads: jax.Array, heads_per_row: int) -> jax.Array:
    """`[..., 2K, H]` to `[..., 2K / F, F * H]`, rows K0 K1, V0 V1, ... of F heads side by side."""
    *dims, count, head_dim = heads.shape
    grouped = heads.reshape(*dims, count // (2 * heads_per_row), heads_per_row, 2, head_dim)
    return jnp.swapaxes(grouped, -3, -2).reshape(*dims, count // heads_per_row, heads_per_row * head_dim)


def split_rows(rows: jax.Array, heads_per_row: int) -> jax.Array:
    """Undo `join_heads`."""
    *dims, count, width = rows.shape
    grouped = rows.reshape(*dims, count // 2, 2, heads_per_row, width // heads_per_row)
    return jnp.swapaxes(grouped, -3, -2).reshape(*dims, count * heads_per_row, width // heads_per_row)


def gather_pages(cache: KVCache, page_ids: jax.Array) -> tuple[jax.Array, ...]:
    """Copy pages out of every layer, as logical heads.

    Args:
        cache: scanned or per layer.
        page_ids: [n] i32; ids out of range give unspecified content.

    Returns:
        Per layer `[n, page_size, 2K, H]` (K0, V0, K1, V1, ...), logical dtype, split over `tensor` as the cache is.
    """
    blocks = []
    for array in cache.layers:
        for index in range(array.shape[0]) if array.ndim == _STACKED_NDIM else [None]:
            at = page_ids if index is None else (index, page_ids)
            pages = array.at[at].get(mode="clip", wrap_negative_indices=False)
            rows = pages.reshape(*pages.shape[:2], -1, pages.shape[-1])
            if cache.heads_per_row > 1:
                blocks.append(from_storage(split_rows(rows, cache.heads_per_row)))
                continue
            heads = rows.reshape(*rows.shape[:2], -1, cache.kv_copies, 2, rows.shape[-1])[:, :, :, 0]
            logical = heads.reshape(*rows.shape[:2], -1, rows.shape[-1])
            blocks.append(from_storage(logical[..., : cache.head_dim or None]))
    return tuple(blocks)


def scatter_pages(cache: KVCache, page_ids: jax.Array, blocks: tuple[jax.Array, ...]) -> KVCache:
    """Write whole pages into every layer.

    Args:
        cache: donated by the caller's jit.
        page_ids: [n] i32; ids out of range are dropped.
        blocks: per layer `[n, page_size, 2K, H]`, as `gather_pages` gives them.

    Returns:
        The cache with those pages replaced.
    """
    layers = []
    rest = iter(blocks)
    for array in cache.layers:
        for index in range(array.shape[0]) if array.ndim == _STACKED_NDIM else [None]:
            at = page_ids if index is None else (index, page_ids)
            heads = _copied(next(rest), cache.kv_copies)
            if cache.heads_per_row > 1:
                heads = join_heads(heads, cache.heads_per_row)
            packed = to_storage(pack_heads(heads, array.shape[-3:]), array.dtype)
            array = array.at[at].set(packed, mode="drop", wrap_negative_indices=False)
        layers.append(array)
    return replace(cache, layers=tuple(layers))


def _copied(heads: jax.Array, copies: int) -> jax.Array:
    """`[n, page_size, 2K, H]` with each K, V pair `copies` times."""
    if copies == 1:
        return heads
    pairs = heads.reshape(*heads.shape[:2], -1, 2, heads.shape[-1])
    return jnp.repeat(pairs, copies, axis=2).reshape(*heads.shape[:2], -1, heads.shape[-1])
