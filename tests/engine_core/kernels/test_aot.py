"""Both attention kernels compiled for every TPU generation, none of which is here: each feature, cache in place."""

import os

import pytest

from engine_core.aot.environment import compiler_environment
from tests.aot import compiles
from tests.child import lines_of

SLICES = ("v5e-1", "v5p-2", "v6e-1", "tpu7x-2")
IN_MAKE_TEST = {"tpu7x-2"}
FEW = ["window+soft_cap+sinks+int8"]
GROUPS = {
    "scores": ["plain", "window", "soft_cap", "sinks", "tree"],
    "dtypes": ["float32", "wide_q", "int8", "e4m3", "e5m2"],
    "heads": ["head64", "head256", "mqa", "mha"],
    "pages": ["page16", "page32", "page64", "page256"],
    "together": ["tree+head64", "tree+int8+sinks", "e4m3+page32+window", "float32+head256+soft_cap", "int8+head64"],
}

pytestmark = compiles


def compile_steps(topology: str, names: list[str]) -> list[dict]:
    """One subprocess: libtpu reads its environment once."""
    environment = compiler_environment(os.environ, [])
    return lines_of("tests.engine_core.kernels.aot_worker", environment, topology, *names, timeout_s=None)


def check(result: dict) -> None:
    assert result["kernels"] == ["decode", "prefill"], result
    assert result["alias_bytes"] >= result["cache_bytes"], "the cache is updated in place"
    assert result["temp_bytes"] < result["cache_bytes"] / 20, "nor is it copied"


@pytest.mark.parametrize(
    "topology", [name if name in IN_MAKE_TEST else pytest.param(name, marks=pytest.mark.aot_matrix) for name in SLICES]
)
def test_a_mixed_step(topology: str) -> None:
    for result in compile_steps(topology, FEW):
        check(result)


@pytest.mark.aot_matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("topology", SLICES)
def test_every_feature(topology: str, group: str) -> None:
    results = compile_steps(topology, GROUPS[group])
    assert [result["names"] for result in results] == GROUPS[group]
    for result in results:
        check(result)
