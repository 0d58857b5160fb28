"""From a Hugging Face checkpoint directory to a `ModelSpec`. Host module.

Reads config.json as transformers 4 and 5 write it. A key that is absent takes the default that transformers gives it;
whatever this engine would compute differently from transformers is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine_core.errors import CheckpointError
from engine_core.kv_scales import read_kv_scales
from engine_core.models.spec import ExpertNames, ModelSpec, MoeSpec, RopeScaling

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeDefaults:
    """What sets one architecture's mixture of experts apart, and the defaults of its config class.

    Attributes:
        expert_size_key: config key of an expert's ffw size.
        expert_size: its default.
        sparse_layers: `decoder_sparse_step` and `mlp_only_layers` decide which layers have experts; otherwise all do.
        normalize: None: the config's `norm_topk_prob`, false by default.
    """

    num_experts: int
    experts_per_token: int
    expert_size_key: str
    expert_size: int
    sparse_layers: bool
    normalize: bool | None
    names: ExpertNames


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What sets one Hugging Face class apart, and the defaults of its config class.

    Attributes:
        num_kv_heads: default of num_key_value_heads; None: as many as query heads.
        head_dim: default of head_dim; None: hidden_size / num_attention_heads.
        optional_window: there is a window only where `use_sliding_window` says so.
        layer_windows: `layer_types` or `max_window_layers` decide which layers have the window; otherwise all do.
        sliding_window: default of sliding_window, None is none.
        eos: default of eos_token_id.
        rms_norm_eps: default of rms_norm_eps.
        rope_theta: default of the rotary base.
        moe: None where every layer is dense.
    """

    qk_norm: bool = False
    qkv_bias: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None
    optional_window: bool = False
    layer_windows: bool = False
    sliding_window: int | None = None
    max_position: int
    eos: tuple[int, ...] = ()
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    moe: MoeDefaults | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "Qwen2ForCausalLM": Architecture(
        qkv_bias=True,
        num_kv_heads=32,
        optional_window=True,
        layer_windows=True,
        sliding_window=4096,
        max_position=32768,
    ),
    "Qwen3ForCausalLM": Architecture(
        qk_norm=True,
        num_kv_heads=32,
        head_dim=128,
        optional_window=True,
        layer_windows=True,
        sliding_window=4096,
        max_position=32768,
    ),
    "Qwen3MoeForCausalLM": Architecture(
        qk_norm=True,
        num_kv_heads=4,
        optional_window=True,
        sliding_window=4096,
        max_position=32768,
        moe=MoeDefaults(
            num_experts=128,
            experts_per_token=8,
            expert_size_key="moe_intermediate_size",
            expert_size=768,
            sparse_layers=True,
            normalize=None,
            names=ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        ),
    ),
    "MixtralForCausalLM": Architecture(
        num_kv_heads=8,
        max_position=131072,
        eos=(2,),
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        moe=MoeDefaults(
            num_experts=8,
            experts_per_token=2,
            expert_size_key="intermediate_size",
            expert_size=14336,
            sparse_layers=False,
            normalize=True,
            names=ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
        ),
    ),
    "LlamaForCausalLM": Architecture(max_position=2048, eos=(2,)),
    "MistralForCausalLM": Architecture(num_kv_heads=8, sliding_window=4096, max_position=131072, eos=(2,)),
}


def load_spec(model_dir: Path) -> ModelSpec:
    """Read what model a checkpoint directory holds.

    Raises:
        CheckpointError: config.json is absent or malformed, or describes a model that is not supported; or the units
            of a float8 cache that lie beside it do not fit.
    """
    config = read_json(model_dir / "config.json")
    generation_path = model_dir / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    try:
        spec = spec_from_config(config, generation)
    except CheckpointError as error:
        raise CheckpointError(f"{model_dir}: {error}") from None
    return replace(spec, kv_scales=read_kv_scales(model_dir, spec.num_layers, spec.num_kv_heads))


def spec_from_config(config: Json, generation: Json) -> ModelSpec:
    """Like `load_spec`, from the parsed config.json and generation_config.json (empty where there is none)."""
    name = _architecture_name(config)
    architecture = ARCHITECTURES[name]
    _refuse_unsupported(config)
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    num_layers = _count(config, "num_hidden_layers")
    kv_heads = _count(config, "num_key_value_heads", architecture.num_kv_heads or heads)
    head_dim = _count(config, "head_dim", architecture.head_dim or hidden // heads)
    if heads % kv_heads:
        raise CheckpointError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise CheckpointError(f"head_dim must be even, not {head_dim}")
    theta, scaling = _rope(config, architecture)
    return ModelSpec(
        architecture=name,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_count(config, "vocab_size"),
        rms_norm_eps=_number(config, "rms_norm_eps", architecture.rms_norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=architecture.qk_norm,
        qkv_bias=architecture.qkv_bias,
        moe=None if architecture.moe is None else _moe(config, architecture.moe, num_layers),
        sliding_window=_windows(config, architecture, num_layers),
        max_position=_count(config, "max_position_embeddings", architecture.max_position),
        eos_token_ids=_eos(config, generation, architecture),
        dtype=_dtype(config),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file; CheckpointError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def _architecture_name(config: Json) -> str:
    names = _list(config, "architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    found = ", ".join(map(str, names)) or "none named"
    raise CheckpointError(f"unsupported architecture ({found}); supported: {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(config: Json) -> None:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise CheckpointError(f"quantized checkpoints are not supported (quantization_config: {method})")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"hidden_act {activation!r} is not supported, only 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise CheckpointError(f"{key} true is not supported for this architecture")


def _moe(config: Json, defaults: MoeDefaults, num_layers: int) -> MoeSpec | None:
    """The experts, or None where no layer has any. `num_experts` is transformers 4's key, `num_local_experts` 5's."""
    key = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    num_experts = _count(config, key, defaults.num_experts)
    per_token = _count(config, "num_experts_per_tok", defaults.experts_per_token)
    if per_token > num_experts:
        raise CheckpointError(f"num_experts_per_tok {per_token} is more than {key} {num_experts}")
    layers = _sparse_layers(config, num_layers) if defaults.sparse_layers else (True,) * num_layers
    if not any(layers):
        return None
    normalize = config.get("norm_topk_prob", False) if defaults.normalize is None else defaults.normalize
    return MoeSpec(
        num_experts=num_experts,
        experts_per_token=per_token,
        intermediate_size=_count(config, defaults.expert_size_key, defaults.expert_size),
        normalize=bool(normalize),
        layers=layers,
        names=defaults.names,
    )


def _sparse_layers(config: Json, num_layers: int) -> tuple[bool, ...]:
    step = _count(config, "decoder_sparse_step", 1)
    dense = _list(config, "mlp_only_layers") or []
    if not all(isinstance(layer, int) for layer in dense):
        raise CheckpointError(f"mlp_only_layers must be integers, not {dense!r}")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))


def _rope(config: Json, architecture: Architecture) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise CheckpointError("rope parameters that differ by layer are not supported")
    theta = _number(rope, "rope_theta", _number(config, "rope_theta", architecture.rope_theta))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError("partial_rotary_factor other than 1 is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"rope type {kind!r} is not supported, only 'default' and 'llama3'")
    return theta, RopeScaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position=_count(rope, "original_max_position_embeddings"),
    )


def _windows(config: Json, architecture: Architecture, num_layers: int) -> tuple[int, ...]:
    """Window of each layer, 0 where there is none."""
    window = config.get("sliding_window", architecture.sliding_window) or 0
    if not isinstance(window, int) or window < 0:
        raise CheckpointError(f"sliding_window must be a positive integer or null, not {window!r}")
    if not architecture.optional_window:
        return (window,) * num_layers
    if not config.get("use_sliding_window", False):
        window = 0
    if not architecture.layer_windows:
        return (window,) * num_layers
    kinds = _list(config, "layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise CheckpointError(f"max_window_layers must be an integer, not {first!r}")
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise CheckpointError(f"layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}")
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise CheckpointError(f"layer_types {unknown[0]!r} is not supported")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _eos(config: Json, generation: Json, architecture: Architecture) -> tuple[int, ...]:
    """End-of-sequence ids; generation_config.json wins, as in transformers."""
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id", architecture.eos)
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(token, int) for token in ids):
        raise CheckpointError(f"eos_token_id must be integers, not {value!r}")
    return tuple(ids)


def _dtype(config: Json) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"dtype {dtype!r} is not supported, only float32, bfloat16 and float16")
    return str(dtype)


def _list(config: Json, key: str) -> list[Any] | None:
    value = config.get(key)
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"{key} must be a list, not {value!r}")
    return value


def _count(config: Json, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{key} must be a positive integer, not {value!r}")
    return value


def _number(config: Json, key: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"{key} must be a positive number, not {value!r}")
    return float(value)
