"""Experts, rows and heads split over 8 virtual CPU devices: parity with transformers and with one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from engine_core.config import Degrees
from engine_core.errors import ConfigError
from engine_core.mesh import check_divisible, make_mesh
from engine_core.models.registry import load_spec
from tests.engine_core.parity import GOLDEN

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results() -> list[dict]:
    """One subprocess for all cases: the number of virtual devices is fixed when jax starts."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine_core.expert_parallel_worker"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_logits_and_tokens_equal_those_of_transformers(results: list[dict]) -> None:
    """The worker has checked that and would have failed; here only that it covered what it should."""
    covered = {(result["degrees"], result["experts"]) for result in results if "case" in result}
    assert {("dp 2 x ep 2 x tp 2", "grouped"), ("dp 1 x ep 8 x tp 1", "grouped")} < covered
    assert {experts for _, experts in covered} == {"grouped", "fused", "auto"}


def test_experts_and_pages_are_split(results: list[dict]) -> None:
    for result in (result for result in results if "case" in result):
        assert result["split_right"], result
        assert result["expert_leaves"] >= (0 if result["case"] == "llama" else 2), result
        assert result["cache_part"] == result["devices"], result


def test_compiles_once_per_bucket(results: list[dict]) -> None:
    for result in (result for result in results if "case" in result):
        assert result["compiled"] == 2, result


def test_a_layer_equals_that_of_one_device(results: list[dict]) -> None:
    """Every load at every split: random, skewed to one expert, and nothing but padding on some shards."""
    layers = [result for result in results if "layer" in result]
    assert {result["layer"] for result in layers} >= {"dp 1 x ep 8 x tp 1", "dp 1 x ep 1 x tp 8", "dp 2 x ep 2 x tp 2"}
    for result in layers:
        assert result["error"] < 1e-5 * result["scale"], result


@pytest.mark.parametrize(
    ("case", "degrees", "message"),
    [
        ("qwen3_moe", Degrees(ep=3), "ep 3 does not divide the model's number of experts 8"),
        ("mixtral", Degrees(ep=2), "number of experts 5"),
        ("qwen3", Degrees(ep=2), "has no experts"),
        ("qwen3_moe", Degrees(tp=4), "num_key_value_heads"),
    ],
)
def test_refuses_a_degree_that_splits_an_expert(case: str, degrees: Degrees, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_divisible(load_spec(GOLDEN / case), degrees)


def test_refuses_more_devices_than_there_are() -> None:
    with pytest.raises(ConfigError, match="dp 2 x ep 3 x tp 1 needs 6 devices"):
        make_mesh(Degrees(dp=2, ep=3), jax.devices()[:1])
