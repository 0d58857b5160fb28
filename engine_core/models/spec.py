"""What a decoder-only model is, read from a Hugging Face config.json. Host module."""

from __future__ import annotations

from dataclasses import dataclass

from engine_core.kv_scales import KvScales


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling (Llama 3.1 release, `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNames:
    """Checkpoint names of a mixture of experts, within a layer: `<block>.experts.<index>.<gate>.weight`."""

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeSpec:
    """A mixture of SwiGLU experts in place of some layers' MLP.

    Attributes:
        normalize: the weights of a token's experts are scaled to sum to 1; otherwise they are what the softmax over all
            experts gives.
        layers: per layer, whether it has experts; the others have a dense MLP.
    """

    num_experts: int  # E
    experts_per_token: int
    intermediate_size: int  # F of one expert
    normalize: bool
    layers: tuple[bool, ...]
    names: ExpertNames


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Shapes and switches of one model.

    Attributes:
        architecture: the Hugging Face class name, such as Qwen3ForCausalLM.
        qk_norm: RMSNorm on each query and key head (Qwen3).
        qkv_bias: biases on the query, key and value projections (Qwen2.5).
        intermediate_size: of dense MLPs.
        moe: None where every layer is dense.
        sliding_window: tokens of window per layer, 0 where a layer sees everything.
        eos_token_ids: any of them ends a sequence.
        kv_scales: units of a float8 cache (`engine_core.kv_scales`); None: all 1.
    """

    architecture: str
    num_layers: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    vocab_size: int  # V
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    moe: MoeSpec | None
    sliding_window: tuple[int, ...]
    max_position: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    kv_scales: KvScales | None = None
