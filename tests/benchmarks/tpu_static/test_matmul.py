"""What is read from a schedule agrees with what a plain matmul's shape says."""

import pytest

from benchmarks.tpu_static.schedule import measure
from engine_core.aot.generation import GENERATIONS
from tests.aot import compiles

pytestmark = compiles
TILE_FLOPS = 2 * 512 * 1024 * 1024


@pytest.mark.parametrize(
    "generation", ["v6e", *(pytest.param(name, marks=pytest.mark.aot_matrix) for name in GENERATIONS if name != "v6e")]
)
def test_mxu_slots_and_bytes_are_exact(generation):
    """Slots taken x what a slot does = FLOPs of the tile; DMA bytes = the tiles' bytes."""
    result = measure("matmul", generation, "4096-bf16", None, 120)
    assert "error" not in result, result["error"]
    (kernel,) = result["kernels"]
    (loop,) = kernel["loops"]
    peak = GENERATIONS[generation]
    ideal = TILE_FLOPS / (peak.bf16_flops / peak.tensor_cores / peak.clock_hz)
    assert loop["use"]["MATMUL"] * loop["cycles"] == pytest.approx(ideal, rel=0.01)
    assert ideal < loop["cycles"] < 2 * ideal
    assert sorted(dma["num_bytes"] for dma in loop["dmas"]) == [1 << 20, 1 << 20, 2 << 20]
    assert loop["passes"] == 8 * 4 * 4
    assert 8 << 20 < kernel["vmem_bytes"] < 16 << 20


@pytest.mark.aot_matrix
def test_int8_takes_half_the_slots_on_v6e():
    slots = []
    for shape in ("4096-bf16", "4096-int8"):
        (loop,) = measure("matmul", "v6e", shape, None, 120)["kernels"][0]["loops"]
        slots.append(loop["use"]["MATMUL"] * loop["cycles"])
    assert slots[0] / slots[1] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("kernel", "shape", "message"),
    [
        ("matmul", "huge", "--shape of matmul must be one of 4096-bf16"),
        ("no-such", "4096-bf16", "--kernel must be one of matmul"),
        ("no.such:build", "4096-bf16", "--kernel no.such:build: No module named"),
    ],
)
def test_errors_name_the_flag(kernel, shape, message):
    assert message in measure(kernel, "v6e", shape, None, 120)["error"]
