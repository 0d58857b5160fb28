"""Named shapes, as one device sees them: what real models make of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from engine_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Sequences of one length over a bfloat16 cache with pages of 128.

    Attributes:
        num_heads: N.
        num_kv_heads: K.
        num_seqs: B.
        q_len: query tokens of each sequence.
        kv_len: tokens of each sequence in the cache, the queries' included.
        head_dim: H.
    """

    num_heads: int
    num_kv_heads: int
    num_seqs: int
    q_len: int
    kv_len: int
    head_dim: int = 128

    page_size = 128

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.num_seqs * self.q_len

    @property
    def pages_per_seq(self) -> int:
        """P."""
        return -(-self.kv_len // self.page_size)

    @property
    def num_pages(self) -> int:
        """Of the pool."""
        return self.num_seqs * self.pages_per_seq

    @property
    def flops(self) -> float:
        """Of the pairs of query and visible key: two products of 2 H each."""
        visible = self.kv_len - (self.q_len - 1) / 2
        return 4.0 * self.num_tokens * visible * self.num_heads * self.head_dim

    @property
    def hbm_bytes(self) -> float:
        """Keys and values once, queries and results once, this step's keys and values written."""
        kv = 2 * self.num_kv_heads * self.head_dim * (self.num_seqs * self.kv_len + self.num_tokens)
        return 2.0 * (kv + 2 * self.num_tokens * self.num_heads * self.head_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedShape:
    """Rows sorted by expert, times each expert's own matrix; bfloat16.

    Attributes:
        rows: in all, spread evenly over the experts.
        depth: inputs of a row.
        width: outputs of a row.
        num_experts: all on this device.
    """

    rows: int
    depth: int
    width: int
    num_experts: int

    @property
    def flops(self) -> float:
        """Two for each row, input and output."""
        return 2.0 * self.rows * self.depth * self.width

    @property
    def hbm_bytes(self) -> float:
        """Every expert's matrix once, rows read and written once."""
        return 2.0 * (self.num_experts * self.depth * self.width + self.rows * (self.depth + self.width))


ATTENTION = {
    "qwen3-8b-decode": AttentionShape(num_heads=32, num_kv_heads=8, num_seqs=128, q_len=1, kv_len=4096),
    "qwen3-8b-prefill": AttentionShape(num_heads=32, num_kv_heads=8, num_seqs=1, q_len=2048, kv_len=8192),
    "qwen3-32b-tp4-decode": AttentionShape(num_heads=16, num_kv_heads=2, num_seqs=128, q_len=1, kv_len=4096),
    "qwen3-32b-tp4-prefill": AttentionShape(num_heads=16, num_kv_heads=2, num_seqs=1, q_len=2048, kv_len=8192),
    "qwen3-30b-a3b-decode": AttentionShape(num_heads=32, num_kv_heads=4, num_seqs=128, q_len=1, kv_len=4096),
    "qwen3-30b-a3b-prefill": AttentionShape(num_heads=32, num_kv_heads=4, num_seqs=1, q_len=2048, kv_len=8192),
}
NARROW = {  # the others' kernels are not asked for these
    "llama-3.2-1b-decode": AttentionShape(
        num_heads=32, num_kv_heads=8, num_seqs=128, q_len=1, kv_len=4096, head_dim=64
    ),
    "llama-3.2-1b-prefill": AttentionShape(
        num_heads=32, num_kv_heads=8, num_seqs=1, q_len=2048, kv_len=8192, head_dim=64
    ),
}
GROUPED = {
    "qwen3-30b-a3b-up-decode": GroupedShape(rows=1024, depth=2048, width=1536, num_experts=128),
    "qwen3-30b-a3b-down-decode": GroupedShape(rows=1024, depth=768, width=2048, num_experts=128),
    "qwen3-30b-a3b-up-prefill": GroupedShape(rows=16384, depth=2048, width=1536, num_experts=128),
    "qwen3-30b-a3b-down-prefill": GroupedShape(rows=16384, depth=768, width=2048, num_experts=128),
}


def attention_shape(name: str) -> AttentionShape:
    """Raises ConfigError where there is none of this name."""
    known = ATTENTION | NARROW
    if name not in known:
        raise ConfigError(f"--shape of an attention kernel must be one of {', '.join(known)}, not {name!r}")
    return known[name]


def grouped_shape(name: str) -> GroupedShape:
    """Raises ConfigError where there is none of this name."""
    if name not in GROUPED:
        raise ConfigError(f"--shape of a grouped matmul must be one of {', '.join(GROUPED)}, not {name!r}")
    return GROUPED[name]
