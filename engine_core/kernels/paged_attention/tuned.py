"""Tile sizes of the kernels: measured ones from `tuned/<device kind>.json`, else a rule."""

from __future__ import annotations

import functools
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from engine_core.kernels.paged_attention.kv_words import WordLayout
from engine_core.kernels.paged_attention.tpu_decode import DecodeTiles, choose_tiles
from engine_core.kernels.paged_attention.tpu_prefill import PrefillTiles

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "tuned"
_VMEM_BYTES = 40 << 20  # of 64 MiB on the generations with the least, the rest is for the compiler
_TILE_KV = 512
_BODY_GROUPS = 8  # lane groups in one loop body: enough to overlap them, few enough to compile fast


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningKey:
    """What tile sizes depend on; local to a device.

    Attributes:
        op: "prefill" or "decode".
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        dtype: of the queries.
        cache_dtype: of the cache.
        page_size: tokens.
    """

    op: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    cache_dtype: str
    page_size: int


@functools.cache
def find(key: TuningKey, device_kind: str) -> dict[str, int] | None:
    """Measured tile sizes; None, said once in the log, where there are none."""
    for entry in _entries(device_kind):
        if entry["key"] == asdict(key):
            tiles: dict[str, int] = entry["tiles"]
            return tiles
    logger.info("no tuned tile sizes for %s on %s; using the rule", key, device_kind)
    return None


@functools.cache
def _entries(device_kind: str) -> list[dict[str, Any]]:
    path = _FOLDER / f"{device_kind.replace(' ', '_').lower()}.json"
    entries: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return entries


def prefill_tiles(key: TuningKey, device_kind: str) -> PrefillTiles:
    """Tile sizes of the prefill kernel."""
    found = find(key, device_kind)
    return PrefillTiles(**found) if found is not None else _prefill_rule(key)


def decode_tiles(key: TuningKey, device_kind: str) -> DecodeTiles:
    """Tile sizes of the decode kernel."""
    found = find(key, device_kind)
    return DecodeTiles(**found) if found is not None else _decode_rule(key)


def _decode_rule(key: TuningKey) -> DecodeTiles:
    pack = 4 // jnp.dtype(key.cache_dtype).itemsize
    words = -(-2 * key.num_kv_heads // pack)
    layout = WordLayout(kv_heads=key.num_kv_heads, words=words, pack=pack, width=-(-key.head_dim // 128) * 128)
    return choose_tiles(layout, key.page_size)


def _prefill_rule(key: TuningKey) -> PrefillTiles:
    """The largest query tile that fits, up to 512 tokens."""
    group = key.num_heads // key.num_kv_heads
    tile_kv = math.lcm(max(_TILE_KV, key.page_size), key.page_size)
    for tile_q in (512, 256, 128):
        lanes = min(tile_q, 256)
        tiles = PrefillTiles(
            tile_q=tile_q,
            lanes=lanes,
            tile_kv=tile_kv,
            sub_kv=256,
            lookahead=3,
            body_heads=math.gcd(key.num_kv_heads, max(1, _BODY_GROUPS * lanes // (group * tile_q))),
        )
        if _prefill_vmem(key, tiles) <= _VMEM_BYTES:
            return tiles
    return tiles


def _prefill_vmem(key: TuningKey, tiles: PrefillTiles) -> int:
    """Bytes that the prefill kernel allocates; see there."""
    item, cache_item = (jnp.dtype(name).itemsize for name in (key.dtype, key.cache_dtype))
    width = -(-key.head_dim // 128) * 128
    pages = 2 * tiles.tile_kv * 2 * key.num_kv_heads * width * cache_item
    queries = 5 * tiles.tile_q * key.num_heads * width * item
    results = 4 * tiles.tile_q * key.num_heads * width
    scores = 4 * (tiles.lookahead + 2) * tiles.tile_kv * tiles.lanes
    return pages + queries + results + scores + 4 * tiles.tile_kv * width * item
