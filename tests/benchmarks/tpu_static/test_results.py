"""The page of results: goals judged, tables, what is kept as JSON; and a run that goes on where it was."""

import importlib.metadata
import importlib.util
import json

import pytest

from benchmarks.tpu_static.__main__ import main
from benchmarks.tpu_static.results import judge, shorten, write_page

KERNEL = {
    "name": "paged_attention_decode.1",
    "total_cycles": 900.0,
    "vmem_bytes": 1 << 20,
    "smem_bytes": 1024,
    "once": {"cycles": 100},
    "loops": [{"passes": 4, "pass_cycles": 200, "dmas": [1, 2, 3]}],
}
RESULT = {
    "kernel": "baton-attention",
    "shape": "qwen3-8b-decode",
    "generation": "v6e",
    "compute_us": 60.0,
    "hbm_us": 100.0,
    "compute_over_hbm": 0.6,
    "flops_share": 0.4,
    "bandwidth_share": 1.0,
    "hot_cycles": 200,
    "hot_use": {"MATMUL": 0.25, "VALU": 0.5},
    "spills": 3,
    "fills": 4,
    "hbm_bytes": 1e6,
    "vmem_bytes": 1 << 20,
    "smem_bytes": 1024,
    "compile_s": 40.0,
    "compile_cpu_s": 20.0,
    "libtpu": "0.0.51",
    "jax": "0.12",
    "kernels": [KERNEL],
}
PEER = {**RESULT, "kernel": "jax-rpa", "compute_us": 110.0}
BROKEN = {"kernel": "tokamax-rpa", "shape": "qwen3-8b-decode", "generation": "v6e", "error": "out of VMEM\nmore"}


@pytest.mark.parametrize(
    ("change", "goal", "met"),
    [
        ({}, "compute/HBM at most 0.8", True),
        ({"compute_over_hbm": 0.81}, "compute/HBM at most 0.8", False),
        ({"shape": "qwen3-8b-prefill", "flops_share": 0.34}, "MFU at least 35%", False),
        ({"shape": "qwen3-8b-prefill", "generation": "v5e"}, "MFU at least 70%", False),
        ({"shape": "qwen3-8b-prefill", "generation": "v5e", "flops_share": 0.71}, "MFU at least 70%", True),
        ({}, "not slower than the best other", True),
        ({"compute_us": 111.0}, "not slower than the best other", False),
        ({}, "compiled within 30 s", True),
        ({"compile_cpu_s": 31.0}, "compiled within 30 s", False),
    ],
)
def test_goals(change, goal, met):
    lines = judge([RESULT | change, PEER, BROKEN])
    assert [line[2] for line in lines if goal in line[0]] == [met]


def test_the_page():
    page = write_page([RESULT, PEER, BROKEN], "2026-01-01")
    assert "Made on 2026-01-01 with libtpu 0.0.51 and jax 0.12" in page
    assert "### qwen3-8b-decode on v6e" in page
    row = "| baton-attention | 60.0 | 100.0 | 0.60 | 40.0% | 100.0% | 200 | VALU 50%, MATMUL 25%,"
    assert row in page
    assert "| tokamax-rpa | out of VMEM |" in page
    assert "- jax-rpa on v6e: qwen3-8b-prefill, qwen3-32b-tp4-decode," in page, "what has no row is said"


def test_what_is_kept():
    short = shorten(RESULT)
    assert short["kernels"] == [
        {name: KERNEL[name] for name in ("name", "total_cycles", "vmem_bytes", "smem_bytes")},
    ]
    assert short["cycles_by_part"]["hot loop"] == 800
    assert shorten(BROKEN) == BROKEN


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_what_is_known_is_not_compiled_again(tmp_path, capsys):
    installed = {"libtpu": importlib.metadata.version("libtpu")}
    path = tmp_path / "known.json"
    path.write_text(json.dumps([RESULT | installed, PEER | installed, RESULT | {"libtpu": "0.0.1"}]))
    flags = ["--generation", "v6e", "--kernel", "baton-attention", "jax-rpa", "--shape", "qwen3-8b-decode"]
    assert main([*flags, "--json", str(path)]) == 0
    printed = capsys.readouterr()
    assert "compiling" not in printed.err
    assert "baton-attention" in printed.out and "jax-rpa" in printed.out
