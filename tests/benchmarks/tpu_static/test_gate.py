"""The gate: what it lets pass, and the goldens themselves."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from benchmarks.tpu_static.gate import GATED, GOLDENS, find_regressions, key_of, load_goldens
from benchmarks.tpu_static.schedule import measure
from tests.aot import compiles

GOLDEN = {"hot_cycles": 1000, "spills": 10, "checks": 2, "vmatmuls": 64, "hot_dma_bytes": 4096}
COPIES = {"hot_copies": 8, "expected_copies": 8, "copy_bytes": [512], "expected_copy_bytes": 512}
SAME = {**GOLDEN, **COPIES, "expected_dma_bytes": 4096}
IN_MAKE_TEST = {
    ("matmul", "v6e", "4096-bf16"),
    ("baton-grouped", "v6e", "qwen3-30b-a3b-down-prefill"),
    ("baton-attention", "v6e", "qwen3-8b-decode"),
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hot_cycles": 1030},
        {"hot_cycles": 900, "spills": 0, "checks": 0},
        {"expected_dma_bytes": None, "expected_copies": None, "expected_copy_bytes": None},
        {"copy_bytes": []},
    ],
)
def test_no_worse_passes(change):
    assert find_regressions({**SAME, **change}, GOLDEN) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hot_cycles": 1031}, "takes 1031 cycles, golden 1000"),
        ({"spills": 11}, "has 11 spills, golden 10"),
        ({"checks": 3}, "has 3 checks, golden 2"),
        ({"vmatmuls": 32}, "vmatmuls are 32, golden 64"),
        ({"hot_dma_bytes": 8192}, "copies 8192 bytes, its tiles have 4096"),
        ({"hot_copies": 9}, "starts 9 copies from HBM, its tiles have 8 pages"),
        ({"copy_bytes": [512, 1024]}, "copies from HBM are of [512, 1024] bytes, a page has 512"),
        ({"error": "Ran out of memory in memory space vmem"}, "does not compile: Ran out of memory"),
    ],
)
def test_worse_is_named(change, message):
    assert message in "; ".join(find_regressions({**SAME, **change}, GOLDEN))


def test_goldens_cover_the_gate_for_each_libtpu():
    for libtpu in json.loads(GOLDENS.read_text()):
        assert set(load_goldens(GOLDENS, libtpu)) == {key_of(*job) for job in GATED}, libtpu


def test_there_are_goldens_of_every_libtpu_that_tests_run_with():
    """Else the gate would be skipped with nobody noticing."""
    requirements = (Path(__file__).parents[3] / "requirements-dev.txt").read_text()
    pinned = set(re.findall(r"^libtpu==([\d.]+)", requirements, re.MULTILINE))
    assert len(pinned) == 2
    assert pinned <= json.loads(GOLDENS.read_text()).keys()


def test_there_are_none_of_an_unknown_libtpu(tmp_path):
    assert load_goldens(GOLDENS, "0.0.1") == {}
    assert load_goldens(tmp_path / "none.json", "0.0.51") == {}


class TestCompiled:
    pytestmark = compiles

    @pytest.mark.parametrize(
        "job",
        [
            pytest.param(job, id=key_of(*job), marks=[] if job in IN_MAKE_TEST else pytest.mark.aot_matrix)
            for job in GATED
        ],
    )
    def test_against_the_golden(self, job):
        libtpu = importlib.metadata.version("libtpu")
        goldens = load_goldens(GOLDENS, libtpu)
        if not goldens:
            pytest.skip(f"there are no goldens of libtpu {libtpu}; make them with python -m benchmarks.tpu_static.gate")
        assert find_regressions(measure(*job, None, 600), goldens[key_of(*job)]) == []
