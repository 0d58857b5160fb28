"""Experts, rows and heads split over 8 virtual CPU devices: parity with transformers and with one device."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from engine_core.config import BatchConfig, CacheConfig, Degrees, EngineConfig
from engine_core.errors import CheckpointError, ConfigError
from engine_core.layers.linear import choose_numbers
from engine_core.layers.moe import choose_experts
from engine_core.mesh import make_mesh
from engine_core.models.decoder import Decoder
from engine_core.models.registry import load_spec
from engine_core.resolve import resolve, weight_bytes
from tests.engine_core.parity import GOLDEN
from tests.engine_core.virtual_devices import results_of


@pytest.fixture(scope="module")
def results() -> list[dict]:
    """One subprocess for all cases."""
    return results_of("expert_parallel_worker", 8)


def test_logits_and_tokens_equal_those_of_transformers(results: list[dict]) -> None:
    """The worker has checked that and would have failed; here only that it covered what it should."""
    covered = {(result["degrees"], result["experts"]) for result in results if "case" in result}
    assert covered == {("dp 2 x ep 2 x tp 2", "grouped"), ("dp 1 x ep 5 x tp 1", "fused")}


def test_experts_and_pages_are_split(results: list[dict]) -> None:
    for result in (result for result in results if "case" in result):
        assert result["split_right"], result
        assert result["expert_leaves"] >= 2, result
        assert result["cache_part"] == result["devices"], result


def test_every_weight_is_read_once_though_devices_hold_copies(results: list[dict]) -> None:
    for result in (result for result in results if "case" in result):
        assert result["read_once"], result


def test_compiles_once_per_bucket(results: list[dict]) -> None:
    for result in (result for result in results if "case" in result):
        assert result["compiled"] == 2, result


def test_a_layer_equals_that_of_one_device(results: list[dict]) -> None:
    """Every load at every split: random, skewed to one expert, and nothing but padding on some shards."""
    layers = [result for result in results if "layer" in result]
    assert {result["layer"] for result in layers} >= {"dp 1 x ep 8 x tp 1", "dp 1 x ep 1 x tp 8", "dp 2 x ep 2 x tp 2"}
    assert {result["by_columns"] for result in layers} == {False, True}
    for result in layers:
        assert result["error"] < 1e-5 * result["scale"], result


@pytest.mark.parametrize(
    ("case", "degrees", "message"),
    [
        ("qwen3_moe", Degrees(ep=3), "ep 3 does not divide the model's number of experts 8"),
        ("mixtral", Degrees(ep=2), "number of experts 5"),
        ("qwen3", Degrees(ep=2), "has no experts"),
        ("qwen3_moe", Degrees(tp=3), "num_key_value_heads"),
    ],
)
def test_refuses_a_degree_that_splits_an_expert(case: str, degrees: Degrees, message: str) -> None:
    numbers, experts = choose_numbers("float32", "cpu"), choose_experts("auto", "float32", "cpu")
    with pytest.raises(ConfigError, match=message):
        Decoder(load_spec(GOLDEN / case), numbers, degrees=degrees, experts=experts, scan=False)


def test_the_tensor_axis_splits_columns_or_else_experts() -> None:
    spec = load_spec(GOLDEN / "qwen3_moe").moe  # 8 experts of 24 columns
    choice = choose_experts("auto", "float32", "cpu")
    assert choice.splits_columns(spec, Degrees(tp=4))
    wide = replace(choice, column_align=16)
    assert not wide.splits_columns(spec, Degrees(tp=4, ep=2))
    assert wide.splits_columns(spec, Degrees(tp=4, ep=4))  # narrow columns: there is no other way
    with pytest.raises(ConfigError, match="tp 5 divides neither the columns of an expert, 24, nor the 8 experts"):
        choice.splits_columns(spec, Degrees(tp=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": BatchConfig(num_slots=9)}, "batch.num_slots is 9, which does not divide over dp 2 x ep 2"),
        ({"cache": CacheConfig(num_pages=66)}, "cache.num_pages is 66, which does not divide over dp 2 x ep 2"),
        ({"cache": CacheConfig(num_pages=28)}, "28 pages on 4 row shards"),
        ({}, "dp 2 x ep 2 x tp 1 but only 2 device"),
    ],
)
def test_the_engine_refuses_what_row_shards_cannot_share(changes: dict, message: str) -> None:
    """A context of 128 tokens takes eight pages, of one shard."""
    config = EngineConfig(dp=2, ep=2, **changes)
    devices = jax.devices()[:1] * (4 if changes else 2)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        resolve(config, load_spec(GOLDEN / "qwen3_moe"), "identity", devices, "float32")


def test_row_shards_split_slots_and_count_copies_of_weights() -> None:
    spec = load_spec(GOLDEN / "qwen3_moe")
    config = EngineConfig(dp=2, ep=2, cache=CacheConfig(num_pages=128), batch=BatchConfig(num_slots=32))
    resolved = resolve(config, spec, "identity", jax.devices()[:1] * 4, "float32")
    assert (resolved.row_shards, resolved.num_slots, resolved.decode_buckets) == (4, 32, (1, 8))
    whole, split, tensor = (
        weight_bytes(spec, "float32", "float32", one) for one in (Degrees(), Degrees(dp=2, ep=2), Degrees(tp=2))
    )
    experts = 4 * 3 * sum(spec.moe.layers) * 8 * spec.moe.intermediate_size * spec.hidden_size
    assert tensor == whole
    assert split == 4 * (whole - experts) + 2 * experts
    assert weight_bytes(spec, "bfloat16", "float32", Degrees()) == (whole - experts) / 2 + experts


def test_refuses_more_devices_than_there_are() -> None:
    with pytest.raises(ConfigError, match="dp 2 x ep 3 x tp 1 needs 6 devices"):
        make_mesh(Degrees(dp=2, ep=3), jax.devices()[:1])
