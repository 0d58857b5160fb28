"""config.json in the spellings of transformers 4 and 5, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine_core.errors import CheckpointError
from engine_core.models.registry import load_spec, spec_from_config
from engine_core.models.spec import RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"]}
QWEN3_MOE = {**LLAMA, "architectures": ["Qwen3MoeForCausalLM"]}
MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"]}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec(config: dict, generation: dict | None = None):
    return spec_from_config(config, generation or {})


def test_absent_keys_take_the_defaults_of_transformers() -> None:
    llama = spec(LLAMA)
    assert (llama.head_dim, llama.rope_theta, llama.rms_norm_eps, llama.dtype) == (8, 10000.0, 1e-6, "float32")
    assert (llama.tie_embeddings, llama.max_position, llama.eos_token_ids) == (False, 2048, (2,))
    assert spec({**LLAMA, "num_key_value_heads": None}).num_kv_heads == 8
    assert spec(QWEN3).head_dim == 128
    assert spec(MISTRAL).sliding_window == (4096,) * 4


def test_architectures_differ_in_biases_and_head_norms() -> None:
    switches = {c["architectures"][0]: (spec(c).qkv_bias, spec(c).qk_norm) for c in (LLAMA, QWEN2, QWEN3, MISTRAL)}
    assert switches == {
        "LlamaForCausalLM": (False, False),
        "Qwen2ForCausalLM": (True, False),
        "Qwen3ForCausalLM": (False, True),
        "MistralForCausalLM": (False, False),
    }


def test_experts_take_the_defaults_of_transformers() -> None:
    qwen, mixtral = spec(QWEN3_MOE), spec(MIXTRAL)
    assert (qwen.head_dim, qwen.rope_theta, qwen.rms_norm_eps, qwen.qk_norm) == (8, 10000.0, 1e-6, True)
    assert (mixtral.rope_theta, mixtral.rms_norm_eps, mixtral.eos_token_ids) == (1e6, 1e-5, (2,))
    assert (qwen.moe.num_experts, qwen.moe.experts_per_token, qwen.moe.intermediate_size) == (128, 8, 768)
    assert (mixtral.moe.num_experts, mixtral.moe.experts_per_token, mixtral.moe.intermediate_size) == (8, 2, 96)
    assert (qwen.moe.normalize, mixtral.moe.normalize) == (False, True)
    assert (qwen.moe.names.block, mixtral.moe.names.block) == ("mlp", "block_sparse_moe")


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_number_of_experts_of_both_versions(key: str) -> None:
    assert spec({**QWEN3_MOE, key: 16, "norm_topk_prob": True}).moe.num_experts == 16
    assert spec({**QWEN3_MOE, "norm_topk_prob": True}).moe.normalize


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        ({}, (True, True, True, True)),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"mlp_only_layers": [0, 2]}, (False, True, False, True)),
        ({"mlp_only_layers": [3], "decoder_sparse_step": 2}, (False, True, False, False)),
        ({"mlp_only_layers": None}, (True, True, True, True)),
    ],
)
def test_which_layers_have_experts(change: dict, layers: tuple[bool, ...]) -> None:
    assert spec({**QWEN3_MOE, **change}).moe.layers == layers


def test_a_moe_model_without_a_moe_layer_is_dense() -> None:
    assert spec({**QWEN3_MOE, "decoder_sparse_step": 5}).moe is None
    assert spec(LLAMA).moe is None


def test_the_window_of_qwen3_moe_holds_for_all_layers_or_none() -> None:
    assert spec({**QWEN3_MOE, "sliding_window": 16, "max_window_layers": 2}).sliding_window == (0,) * 4
    windowed = {**QWEN3_MOE, "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}
    assert spec(windowed).sliding_window == (16,) * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 4}, "num_experts_per_tok 8 is more than num_experts 4"),
        ({"num_local_experts": 0}, "num_local_experts must be a positive integer"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer"),
        ({"mlp_only_layers": ["first"]}, "mlp_only_layers must be integers"),
        ({"moe_intermediate_size": "large"}, "moe_intermediate_size"),
    ],
)
def test_refuses_experts_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec({**QWEN3_MOE, **change})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING}},
    ],
)
def test_rope_scaling_of_both_versions(rope: dict) -> None:
    read = spec({**LLAMA, **rope})
    assert read.rope_theta == 5e5
    assert read.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )


def test_rope_without_scaling() -> None:
    read = spec({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert (read.rope_theta, read.rope_scaling) == (1e6, None)
    assert spec({**LLAMA, "rope_theta": 1e4, "rope_scaling": None}).rope_scaling is None


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_both_versions(key: str) -> None:
    assert spec({**LLAMA, key: "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({**QWEN2, "sliding_window": 16}, (0, 0, 0, 0)),
        ({**QWEN2, "sliding_window": 16, "use_sliding_window": True}, (0, 0, 0, 0)),
        ({**QWEN2, "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, (0, 0, 16, 16)),
        (
            {
                **QWEN3,
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (16, 0, 16, 0),
        ),
        ({**MISTRAL, "sliding_window": None}, (0, 0, 0, 0)),
        ({**MISTRAL, "sliding_window": 32}, (32,) * 4),
        ({**LLAMA, "sliding_window": None}, (0,) * 4),
    ],
)
def test_sliding_windows(config: dict, windows: tuple[int, ...]) -> None:
    assert spec(config).sliding_window == windows


def test_generation_config_decides_the_end_of_sequence() -> None:
    config = {**LLAMA, "eos_token_id": 7}
    assert spec(config).eos_token_ids == (7,)
    assert spec(config, {"eos_token_id": [8, 9]}).eos_token_ids == (8, 9)
    assert spec(config, {"temperature": 0.6}).eos_token_ids == (7,)
    assert spec({**LLAMA, "eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*Qwen2ForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": "100"}, "vocab_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized.*fp8"),
        ({"quantization_config": "fp8"}, "quantized"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a positive number"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": 2.5}, "eos_token_id"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
    ],
)
def test_refuses_with_one_clear_line(change: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(CheckpointError, match=message) as raised:
        load_spec(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": -1}, "sliding_window"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ],
)
def test_refuses_unknown_windows(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec({**QWEN3, **change})


def test_refuses_absent_or_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        load_spec(tmp_path)
