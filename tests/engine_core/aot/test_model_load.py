"""What models weigh and compute, against their published sizes and sums done by hand."""

import json

import pytest

from engine_core.aot.model_load import decode_load, num_parameters, prefill_load, weight_bytes
from engine_core.config import Degrees
from engine_core.layers.linear import choose_numbers
from engine_core.layers.moe import choose_experts
from engine_core.models.decoder import Decoder
from engine_core.models.registry import spec_from_config
from engine_core.resolve import cache_layout
from tests.aot import MODELS


def decoder(name: str, tp: int) -> Decoder:
    spec = spec_from_config(json.loads((MODELS / f"{name}.json").read_text()), {})
    experts = choose_experts("auto", "bfloat16", "tpu")
    return Decoder(spec, choose_numbers("bfloat16", "tpu"), degrees=Degrees(tp=tp), experts=experts, scan=True)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
        ("llama-3.3-70b", 70.55),
        ("qwen3-30b-a3b", 30.53),
        ("qwen3-235b-a22b", 235.09),
    ],
)
def test_parameters_as_published(name, billions):
    assert num_parameters(decoder(name, 1)) / 1e9 == pytest.approx(billions, abs=0.01)


def test_weights_are_split_over_the_devices():
    whole, part = (weight_bytes(decoder("qwen3-32b", tp)) for tp in (1, 8))
    assert whole == pytest.approx(2 * 32.76e9, rel=1e-3)
    assert whole / part == pytest.approx(8, rel=1e-3)


def test_a_dense_decode_step():
    """Two FLOPs for each weight and token but the embedding's; every weight and every sequence's KV read once."""
    model = decoder("qwen3-8b", 4)
    layout = cache_layout(model.spec, "bfloat16", 0, "tpu", model.degrees.tp)
    load = decode_load(model, layout, 10, 1000)
    multiplied = num_parameters(model) - 151936 * 4096
    assert load.matmul_flops == pytest.approx(2 * 10 * multiplied / 4, rel=1e-3)
    assert load.weight_bytes == pytest.approx(2 * multiplied / 4, rel=1e-3)
    assert load.attention_flops == 4 * 10 * 1000 * 32 * 128 * 36 / 4
    assert load.kv_bytes == 10 * 1000 * 36 * 2 * 8 * 128 * 2 / 4


def test_experts_that_are_used_and_experts_that_are_read():
    """A3B: 3.3 billion active parameters, 8 of 128 experts; one token reads those, 128 tokens nearly all."""
    model = decoder("qwen3-30b-a3b", 1)
    layout = cache_layout(model.spec, "bfloat16", 0, "tpu", model.degrees.tp)
    one, many = decode_load(model, layout, 1, 1), decode_load(model, layout, 128, 1)
    active = 3.35e9 - 151936 * 2048
    assert one.matmul_flops == pytest.approx(2 * active, rel=0.01)
    assert one.weight_bytes == pytest.approx(2 * active, rel=0.01)
    assert many.matmul_flops == pytest.approx(128 * one.matmul_flops, rel=1e-6)
    assert many.weight_bytes == pytest.approx(2 * (30.53e9 - 151936 * 2048), rel=0.01)


def test_chunks_of_a_prompt_see_half_of_it_on_average():
    """The sum over all chunks is that of the whole prompt: n (n + 1) / 2 pairs."""
    model = decoder("qwen3-8b", 1)
    layout = cache_layout(model.spec, "bfloat16", 0, "tpu", model.degrees.tp)
    load = prefill_load(model, layout, 512, 4096)
    pairs = 4096 * 4097 / 2
    assert load.attention_flops * 8 == pytest.approx(4 * pairs * 32 * 128 * 36)
    assert prefill_load(model, layout, 512, 100).attention_flops == 4 * 100 * 101 / 2 * 32 * 128 * 36
