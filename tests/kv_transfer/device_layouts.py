"""Run by test_repaging on 4 virtual CPU devices: KV from one device cache to another of another layout.

Every ordered pair of eight layouts: tensor parallelism 1, 2 and 4, page sizes, dtypes, padded heads, stacked layers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from engine_core.config import Degrees
from engine_core.kv_cache import CacheLayout, KVCache, create_cache, gather_pages, scatter_pages
from engine_core.mesh import make_mesh
from kv_transfer.blocks import HostBlocks, as_layers, as_rows
from kv_transfer.layout import BlockLayout
from kv_transfer.repaging import Repaging

NUM_TOKENS = 45
POOL_TOKENS = 96
LAYERS, HEADS, HEAD_DIM = 3, 4, 8


@dataclass(frozen=True)
class Kind:
    tp: int
    page_size: int
    dtype: str
    head_align: int
    stacked: bool

    @property
    def layout(self) -> CacheLayout:
        return CacheLayout(
            num_layers=LAYERS,
            num_pages=POOL_TOKENS // self.page_size,
            page_size=self.page_size,
            num_kv_heads=HEADS,
            head_dim=HEAD_DIM,
            dtype=self.dtype,
            head_align=self.head_align,
            tp=self.tp,
        )

    def create(self) -> KVCache:
        return create_cache(self.layout, make_mesh(Degrees(tp=self.tp), jax.devices()), self.stacked)


KINDS = [
    Kind(1, 4, "bfloat16", 1, False),
    Kind(2, 16, "bfloat16", 16, False),
    Kind(4, 8, "float32", 1, True),
    Kind(2, 4, "float32", 16, True),
    Kind(4, 16, "bfloat16", 1, True),
    Kind(1, 8, "float32", 16, False),
    Kind(2, 8, "float8_e4m3fn", 16, False),
    Kind(1, 16, "float8_e4m3fn", 1, True),
]

gather = jax.jit(gather_pages)
scatter = jax.jit(scatter_pages, donate_argnums=0)


def fill(cache: KVCache, kind: Kind, page_ids: np.ndarray) -> KVCache:
    """Tokens 0 to NUM_TOKENS - 1 in those pages, 7 behind them."""
    rng = np.random.default_rng(0)
    count = len(page_ids) * kind.page_size
    blocks = []
    for _ in range(LAYERS):
        values = np.full((count, 2 * HEADS, HEAD_DIM), 7, np.float32)
        values[:NUM_TOKENS] = rng.standard_normal((NUM_TOKENS, 2 * HEADS, HEAD_DIM), np.float32)
        shaped = values.reshape(len(page_ids), kind.page_size, 2 * HEADS, HEAD_DIM)
        blocks.append(np.asarray(jnp.asarray(shaped, kind.dtype)))
    return scatter(cache, page_ids, tuple(blocks))


def tokens_of(cache: KVCache, page_ids: np.ndarray) -> list[np.ndarray]:
    layers = gather(cache, page_ids)
    return [np.asarray(layer).reshape(-1, 2 * HEADS, HEAD_DIM)[:NUM_TOKENS] for layer in layers]


def hand_over(mine: Kind, theirs: Kind) -> None:
    def pages(kind: Kind, seed: int) -> np.ndarray:
        count = -(-NUM_TOKENS // kind.page_size)
        chosen = np.random.default_rng(seed).permutation(kind.layout.num_pages)[:count]
        return chosen.astype(np.int32)

    source_ids, target_ids = pages(mine, 1), pages(theirs, 2)
    source = fill(mine.create(), mine, source_ids)
    target = theirs.create()
    source_layout, target_layout = BlockLayout.of(mine.layout, None), BlockLayout.of(theirs.layout, None)
    repaging = Repaging(source_layout, target_layout)
    converted = []
    for start in range(0, len(source_ids), 2):
        chunk = source_ids[start : start + 2]
        layers = [np.asarray(layer) for layer in gather(source, chunk)]
        rows = as_rows(layers, len(chunk), source_layout)
        converted += repaging.add(range(start, start + len(chunk)), HostBlocks(rows, None))
    for indices, blocks, _ in converted + repaging.flush():
        target = scatter(target, target_ids[list(indices)], tuple(as_layers(blocks.rows, target_layout)))
    for sent, landed in zip(tokens_of(source, source_ids), tokens_of(target, target_ids), strict=True):
        np.testing.assert_array_equal(landed, sent.astype(landed.dtype))
    untouched = np.setdiff1d(np.arange(theirs.layout.num_pages, dtype=np.int32), target_ids)
    assert all(not np.asarray(layer).any() for layer in gather(target, untouched))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    combinations = list(itertools.product(KINDS, repeat=2))
    for pair in combinations:
        hand_over(*pair)
    print(len(combinations))
