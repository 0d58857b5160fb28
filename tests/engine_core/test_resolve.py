"""What a configuration means on a TPU; the devices are stand-ins that say what they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from engine_core.config import BatchConfig, CacheConfig, EngineConfig
from engine_core.errors import ConfigError
from engine_core.models.registry import spec_from_config
from engine_core.resolve import resolve
from engine_core.types import Numerics

MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
CONFIG = EngineConfig()


@dataclass(frozen=True)
class Device:
    """As much of a `jax.Device` as is asked."""

    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"

    def memory_stats(self):
        return {"bytes_limit": 1 << 30}


def resolve_on(device, config=CONFIG, **model):
    return resolve(config, spec_from_config({**MODEL, **model}, {}), "weights", [device, device], "bfloat16")


def test_a_model_on_a_tpu():
    resolved = resolve_on(Device())
    assert resolved.layout.page_shape == (128, 4, 2, 128)
    assert resolved.stacked


@pytest.mark.parametrize(
    ("device", "config", "model", "message"),
    [
        ("TPU v4", CONFIG, {}, "TPU generation TPU v4 is not supported; supported: TPU v5 lite, TPU v5"),
        ("TPU v6 lite", CONFIG, {"head_dim": 96}, "head_dim 96 is not supported; supported: 64, 128, 256"),
        (
            "TPU7x",
            replace(CONFIG, cache=CacheConfig(page_size=8)),
            {},
            "page_size 8 is not supported; supported: 16, 32, 64, 128, 256",
        ),
        (
            "TPU v5",
            replace(CONFIG, cache=CacheConfig(page_size=16), batch=BatchConfig(num_slots=1024)),
            {},
            "a page table of 262144 ids does not fit scalar memory",
        ),
        (
            "TPU7x",
            replace(CONFIG, numerics=Numerics.STRICT),
            {},
            "strict, which is not supported on TPUs.*supported: fast",
        ),
    ],
    ids=["generation", "head_dim", "page_size", "page table", "strict numerics"],
)
def test_what_the_kernels_cannot_do_is_refused_before_anything_is_loaded(device, config, model, message):
    with pytest.raises(ConfigError, match=message):
        resolve_on(Device(device), config, **model)


def test_other_platforms_are_not_asked():
    config = replace(CONFIG, cache=CacheConfig(page_size=8))
    assert resolve_on(Device("cpu", "cpu"), config, head_dim=96).layout.page_shape == (8, 8, 1, 96)


def test_narrow_heads_share_rows():
    """With tp 2 each device has two KV heads of 64: a row of 128 lanes."""
    model = {"head_dim": 64}
    assert resolve_on(Device(), **model).layout.page_shape == (128, 2, 2, 128)
    assert resolve_on(Device(), replace(CONFIG, tp=2), **model).layout.page_shape == (128, 2, 2, 128)
    padded = resolve_on(Device(), replace(CONFIG, tp=2), num_key_value_heads=2, **model).layout
    assert padded.page_shape == (128, 2, 2, 128)
    assert padded.heads_per_row == 1


def test_a_float8_cache_holds_twice_the_pages():
    plain = resolve_on(Device())
    narrow = resolve_on(Device(), replace(CONFIG, cache=CacheConfig(dtype="float8_e4m3fn")))
    assert (plain.dtype, narrow.dtype) == ("bfloat16", "bfloat16")
    assert narrow.layout.page_shape == (128, 2, 4, 128)
    assert narrow.layout.page_bytes * 2 == plain.layout.page_bytes
    assert narrow.layout.num_pages // 2 == plain.layout.num_pages, "weights take what they took"


def test_an_unknown_cache_dtype_is_refused_at_start():
    with pytest.raises(ConfigError, match=r"cache\.dtype must be auto or float8_e4m3fn, not 'int8'"):
        replace(CONFIG, cache=CacheConfig(dtype="int8"))
    with pytest.raises(ConfigError, match=r"cache\.dtype float8_e4m3fn holds two KV heads in a word"):
        resolve_on(Device(), replace(CONFIG, cache=CacheConfig(dtype="float8_e4m3fn"), tp=2), num_key_value_heads=2)
