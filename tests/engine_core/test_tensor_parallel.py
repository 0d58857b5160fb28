"""Tensor parallelism on virtual CPU devices: parity with transformers, and the collectives that its source shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine_core.config import Degrees
from engine_core.errors import ConfigError
from engine_core.layers.linear import choose_numbers
from engine_core.layers.moe import choose_experts
from engine_core.models.decoder import Decoder
from engine_core.models.registry import load_spec
from tests.engine_core.parity import GOLDEN
from tests.engine_core.virtual_devices import results_of

NUM_LAYERS = 3


@pytest.fixture(scope="module")
def results() -> list[dict]:
    """One subprocess for all cases."""
    return results_of("tensor_parallel_worker", 4)


def test_logits_and_tokens_equal_those_of_transformers_on_two_and_four_devices(results: list[dict]) -> None:
    """The worker has checked that and would have failed; here only that it covered what it should."""
    assert {result["tp"] for result in results} == {2, 4}
    assert {result["scan"] for result in results} == {False, True}


def test_weights_and_cache_are_split(results: list[dict]) -> None:
    for result in results:
        assert result["split_leaves"] == result["sharded_leaves"] > 4, result
        kv_heads = 4 if result["case"] == "mistral" else 2
        assert result["cache_shard"][-3] == 2 * max(1, kv_heads // result["tp"]), result


def test_collectives_are_those_of_the_source(results: list[dict]) -> None:
    """Two all-reduces per layer (traced once when scanned) and one for the embedding; one all-gather of logits."""
    for result in results:
        layers = 1 if result["scan"] else NUM_LAYERS
        assert result["all_reduces"] == 2 * layers + 1, result
        assert result["all_gathers"] == 1, result


def test_compiles_once_per_bucket(results: list[dict]) -> None:
    for result in results:
        assert result["compiled"] == 2, result


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "message"),
    [
        (4, 4, 3, "tp 3 neither divides the model's num_key_value_heads 4 nor is a multiple of it"),
        (6, 6, 4, "num_key_value_heads 6"),
        (6, 2, 4, "tp 4 does not divide the model's num_attention_heads 6"),
    ],
)
def test_refuses_a_degree_that_splits_heads(heads: int, kv_heads: int, tp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoder(
            replace(load_spec(GOLDEN / "qwen3"), num_heads=heads, num_kv_heads=kv_heads),
            choose_numbers("float32", "cpu"),
            degrees=Degrees(tp=tp),
            experts=choose_experts("auto", "float32", "cpu"),
            scan=False,
        )
