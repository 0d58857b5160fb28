"""How models are laid over slices: heads first, then row shards, copies of KV heads last."""

import json

import pytest

from engine_core.aot.plan import _build
from engine_core.aot.split import AskedDegrees, choose_splits
from engine_core.config import Degrees
from engine_core.errors import ConfigError
from engine_core.models.registry import spec_from_config
from tests.aot import MODELS


def splits(name: str, num_devices: int, **asked: int) -> list[Degrees]:
    spec = spec_from_config(json.loads((MODELS / f"{name}.json").read_text()), {})
    return choose_splits(spec.num_kv_heads, num_devices, AskedDegrees(**asked), lambda degrees: _build(spec, degrees))


@pytest.mark.parametrize(
    ("name", "num_devices", "first"),
    [
        ("qwen3-8b", 1, Degrees()),
        ("qwen3-32b", 8, Degrees(tp=8)),
        ("qwen3-32b", 16, Degrees(tp=8, dp=2)),  # 8 KV heads
        ("qwen3-30b-a3b", 8, Degrees(tp=4, ep=2)),  # 4 KV heads, experts for the rest
        ("qwen3-235b-a22b", 32, Degrees(tp=4, ep=8)),
        ("llama-3.3-70b", 256, Degrees(tp=8, dp=32)),
    ],
)
def test_the_first_choice(name, num_devices, first):
    assert splits(name, num_devices)[0] == first


def test_copies_of_heads_are_the_second_choice():
    assert splits("llama-3.3-70b", 16) == [Degrees(tp=8, dp=2), Degrees(tp=16)]


def test_what_was_asked_for_is_kept():
    assert splits("qwen3-32b", 16, tp=16) == [Degrees(tp=16)]
    assert splits("qwen3-30b-a3b", 8, dp=2)[0] == Degrees(tp=4, dp=2)
    assert splits("qwen3-30b-a3b", 8, ep=8) == [Degrees(ep=8)]


@pytest.mark.parametrize(
    ("name", "num_devices", "asked", "message"),
    [
        ("qwen3-32b", 8, {"tp": 3}, "--tp 3: no split of that kind takes 8 devices"),
        ("qwen3-32b", 8, {"tp": 2, "dp": 2}, "--tp 2 --dp 2: ep is 2 but Qwen3ForCausalLM has no experts"),
        ("qwen3-32b", 8, {"tp": 2, "ep": 1, "dp": 2}, "--tp 2 --ep 1 --dp 2: no split of that kind takes 8 devices"),
        ("qwen3-30b-a3b", 64, {"tp": 64}, "--tp 64: tp 64 does not divide the model's num_attention_heads 32"),
    ],
)
def test_refusals_name_the_flags(name, num_devices, asked, message):
    with pytest.raises(ConfigError, match=message):
        splits(name, num_devices, **asked)
