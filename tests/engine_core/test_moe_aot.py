"""The MoE layer compiled for real TPU generations, none of which is here: kernels, exchanges, no copies of weights."""

from __future__ import annotations

import itertools
import os

import pytest

from engine_core.aot.environment import compiler_environment
from tests.child import lines_of

pytest.importorskip("libtpu")

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
NARROW = ("int8", "float8_e4m3fn", "float8_e5m2")
WEIGHT_BYTES = 3 * 16 * 512 * 256 * 2


def run_worker(*arguments: str) -> list[dict]:
    environment = compiler_environment(os.environ, [])
    return lines_of("tests.engine_core.moe_aot_worker", environment, *arguments, timeout_s=280)


@pytest.fixture(scope="module")
def results() -> list[dict]:
    """One subprocess for all: libtpu reads its environment once."""
    return run_worker()


@pytest.mark.aot_matrix
def test_narrow_weights_compile_for_every_generation() -> None:
    found = run_worker("narrow")
    assert [(one["topology"], one["dtype"]) for one in found] == list(itertools.product(TOPOLOGIES, NARROW))
    for one in found:
        assert one["kernels"] == 1, one


def test_every_generation_compiles(results: list[dict]) -> None:
    assert [result["topology"].split(":")[0] for result in results] == ["v5e", "v5p", "v6e", "tpu7x"]
    assert {result["by_columns"] for result in results} == {False, True}


def test_both_products_are_the_pallas_kernel(results: list[dict]) -> None:
    assert [result["kernels"] for result in results] == [2, 2, 2, 2]


def test_rows_travel_by_two_ragged_exchanges_and_only_between_experts(results: list[dict]) -> None:
    for result in results:
        assert result["exchanges"] == (0 if "ep 1" in result["degrees"] else 2), result


def test_weights_are_not_copied(results: list[dict]) -> None:
    for result in results:
        assert result["weight_copies"] == 0, result
        assert result["temp_bytes"] < WEIGHT_BYTES / 4, result
