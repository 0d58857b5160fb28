"""Sizes of a call of the decode kernel, and the references that its parts share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine_core.kernels.paged_attention.kv_words import WordLayout

INPUTS, RESULTS, NEW_ROWS = range(3)
MASKED = -1e30
LANES = 128
SUBLANES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTiles:
    """Static sizes of the decode kernel.

    Attributes:
        tile_kv: tokens of one item; a multiple of the page size and of `WordLayout.block_tokens`.
        group: items of one iteration.
        num_buffers: groups in the ring, at least 3.
    """

    tile_kv: int
    group: int
    num_buffers: int


def choose_tiles(words: WordLayout, page_size: int) -> DecodeTiles:
    """Tiles by rule: items of 1024 rows of keys, 8192 in a group, so far as whole pages and blocks allow.

    Smaller items waste less on the ends of short sequences; larger groups spend less on each iteration's end, but take
    long to compile. float32 is multiplied in six passes, which is as much code.
    """
    per_group = 2048 if words.pack == 1 else 8192
    unit = math.lcm(page_size, words.block_tokens)
    rows = unit * words.heads * words.width // LANES
    tile_kv = unit * max(1, 1024 // rows)
    group = max(1, per_group * unit // (rows * tile_kv))
    return DecodeTiles(tile_kv=tile_kv, group=group, num_buffers=4)


class Sizes(NamedTuple):
    """Static sizes and choices of one call."""

    rows: int  # B
    heads: int  # N, aligned to 8
    group_heads: int  # N / K
    pages: int  # P
    page_size: int
    words: WordLayout
    tiles: DecodeTiles
    scale: float
    soft_cap: float | None
    windowed: bool
    native: bool  # compiled, not interpreted

    @property
    def blocks(self) -> int:
        """Blocks of an item."""
        return self.tiles.tile_kv // self.words.block_tokens


class Refs(NamedTuple):
    """What the kernel sees. U = items of a group, R = rows (token, KV head) of an item."""

    kv_lens: Any  # [B] i32 SMEM
    page_table: Any  # [B * P] i32 SMEM
    base_page: Any  # [1] i32 SMEM
    num_decode: Any  # [1] i32 SMEM
    window: Any  # [1] i32 SMEM
    kv_scales: Any  # [2] f32 SMEM
    sinks: Any  # [N, 128] f32 VMEM, in base 2; MASKED: none
    q_in: Any  # [B, N, H] HBM
    new_in: Any  # [B, 2K / pack, H] u32 HBM: the new tokens' words
    cache_in: Any  # aliased to `cache`
    out: Any  # [B, N, H] HBM
    cache: Any  # [pages of all layers, page_size, 2K / pack, pack, H] HBM
    q: Any  # [B + 1, N, H] VMEM; a finished row holds its result, the last row what is no result
    new: Any  # [B, 2K / pack, H] u32 VMEM
    leaving: Any  # [B, 2K / pack, pack, H] VMEM: new tokens on their way to the cache
    kv: Any  # [num_buffers, U * tile_kv, 2K / pack, pack, H] VMEM
    scores: Any  # [U, N, R] f32 VMEM, base 2
    weights: Any  # [U, N, R] VMEM, in q's dtype
    highest: Any  # [U, N, 128] f32 VMEM: highest of `scores`, by lane
    decays: Any  # [U, N, 128] f32 VMEM: of `acc` at each item
    token_of: Any  # [8, block rows] i32 VMEM: token offset of a score column in its block
    bias: Any  # [N, block rows] f32 VMEM: masks rows of other KV heads
    top: Any  # [N, 128] f32 VMEM: highest score of the sequence so far
    total: Any  # [N, 128] f32 VMEM: its sum of weights, by lane
    acc: Any  # [N, H] f32 VMEM: its sum of values
    zeros: Any  # [N, H] VMEM
    sequences: Any  # [B + 1] i32 SMEM: rows that have tokens
    item_row: Any  # [num_buffers * U] i32 SMEM
    item_first: Any  # [num_buffers * U] i32 SMEM: 1 if it is its sequence's first
    item_hidden: Any  # [num_buffers * U] i32 SMEM: tokens before the first visible one; may be negative
    item_left: Any  # [num_buffers * U] i32 SMEM: tokens to the sequence's end; 0 or less: there is no such item
    item_page: Any  # [num_buffers * U] i32 SMEM: page of the sequence's new token
    item_offset: Any  # [num_buffers * U] i32 SMEM: its place there
    arriving: Any  # [num_buffers] i32 SMEM: tokens that the copies of a group bring
    num_edges: Any  # [num_buffers] i32 SMEM
    edges: Any  # [num_buffers * U] i32 SMEM: items of the group that begin or end a sequence
    kv_sems: Any  # [num_buffers]
    sems: Any  # [3]: inputs, results, rows of the cache
