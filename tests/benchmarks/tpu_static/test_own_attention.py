"""How often the loops of the attention kernels run, on schedules made by hand after libtpu's."""

import pytest

from benchmarks.tpu_static.bundles import UNITS, Dma, Loop, Schedule, ScheduleError, Work
from benchmarks.tpu_static.kernels.own_attention import _decode_runs, _prefill_runs
from benchmarks.tpu_static.kernels.shapes import attention_shape
from benchmarks.tpu_static.schedule import measure
from engine_core.kernels.paged_attention.tpu_decode import DecodeTiles
from engine_core.kernels.paged_attention.tpu_prefill import PrefillTiles
from tests.aot import compiles

DECODE = DecodeTiles(tile_kv=128, group=8, num_buffers=4)
PREFILL = PrefillTiles(tile_q=512, lanes=256, tile_kv=512, sub_kv=256, lookahead=2, body_heads=2)


def work(cycles, *, products=0, dmas=0, use=()):
    return Work(
        cycles=cycles,
        stalls=0,
        use=dict.fromkeys(UNITS, 0) | dict(use),
        vmatmuls=products,
        dmas=(Dma("hbm_to_vmem", None),) * dmas,
        waits=0,
        checks=0,
    )


def schedule(*loops):
    """Of (start, stop, parent, work)."""
    depths: list[int] = []
    made = []
    for start, stop, parent, own in loops:
        depths.append(0 if parent is None else depths[parent] + 1)
        made.append(Loop(start=start, stop=stop, depth=depths[-1], parent=parent, own=own, regions=()))
    return Schedule(
        name="kernel",
        cycles=10_000,
        capacity=dict.fromkeys(UNITS, 1),
        loops=tuple(made),
        outside=work(100),
        vmem_bytes=0,
        smem_bytes=0,
    )


COPY = {"VLOAD": 60, "VSTORE": 64}


def test_decode():
    """128 sequences of 32 items in 512 groups, of which the ring of 4 holds 3 when the steady loop begins."""
    runs = _decode_runs(attention_shape("qwen3-8b-decode"), DECODE)(
        schedule(
            (24, 57, None, work(33, use=COPY)),  # queries
            (83, 101, None, work(18)),  # list of sequences
            (110, 124, None, work(14, dmas=1)),  # zeros of rows without tokens
            (1470, 1576, None, work(82, dmas=1)),  # edges of the first groups
            (1526, 1534, 3, work(8)),  # clears what is behind a sequence
            (2980, 5099, None, work(1981, products=128, dmas=8)),  # steady
            (4914, 4943, 5, work(29, dmas=1)),  # results
            (4976, 5085, 5, work(85, dmas=1)),  # edges
            (5035, 5043, 7, work(8)),  # clears
            (5114, 7106, None, work(1860, products=128)),  # drains
            (6937, 6960, 9, work(23, dmas=1)),
            (8514, 8537, None, work(23, dmas=1)),  # results of the last group
        )
    )
    queries = 128 * 32 * 128 * 2 / (64 * 4096)
    passes = [queries, 128, 0, 0.25, 0, 509, 509 / 4, 509 / 4, 0, 2, 0.5, 0.25]
    assert [run.passes for run in runs] == passes
    assert [run.cycles for run in runs][5] == 1981


def test_prefill():
    """Four items of 512 queries at 6144, 6656, ...: 12, 13, 14 and 15 whole tiles, one on the diagonal each."""
    loops = [
        (565, 13880, None, work(254, dmas=1)),  # items
        (689, 722, 0, work(33, use=COPY)),  # queries
        (845, 878, 0, work(33)),  # small: scale, begin, tiles, finish, store
        (878, 920, 0, work(42)),
        (926, 3497, 0, work(524)),
        (1529, 2434, 4, work(905, products=68, use={"VALU": 100})),
        (2505, 3483, 4, work(978, products=68, use={"VALU": 200})),
        (3498, 3718, 0, work(220)),
        (3721, 3752, 0, work(31)),
        (3772, 4296, 0, work(524)),  # large: the same
        (4296, 4374, 0, work(78)),
        (4380, 13237, 0, work(644)),
        (4496, 4518, 11, work(22, dmas=1)),
        (4554, 4576, 11, work(22)),
        (4658, 4674, 11, work(16, dmas=1)),
        (4995, 8895, 11, work(3900, products=800, use={"VALU": 100})),
        (9070, 13223, 11, work(4153, products=800, use={"VALU": 200})),
        (13238, 13530, 0, work(292)),
        (13533, 13842, 0, work(309)),
    ]
    runs = _prefill_runs(attention_shape("qwen3-8b-prefill"), PREFILL)(schedule(*loops))
    passes = dict(zip((start for start, *_ in loops), (run.passes for run in runs), strict=True))
    assert passes[565] == 4
    assert passes[4380] == 54 + 4
    assert (passes[4995], passes[9070]) == (54 * 4, 4 * 4), "eight KV heads, two in a body"
    assert passes[3772] == passes[13533] == 4 * 32 / 4, "four query heads at a time"
    assert passes[4296] == passes[13238] == 4 * 64 / 4, "four lane groups of 256 queries at a time"
    assert passes[4496] == passes[4658] == (58 * 4 + 16) / 2, "pages read and written"
    assert not any(passes[start] for start in (845, 878, 926, 1529, 2505, 3498, 3721, 4554))
    assert runs[11].cycles == round(644 - (9070 - 8895) * 54 / 58), "the masks are made for tiles on the diagonal"


def test_shapes_that_are_not_counted_are_refused():
    with pytest.raises(ScheduleError, match="is no multiple of tile_kv 384"):
        _decode_runs(attention_shape("qwen3-8b-decode"), DecodeTiles(tile_kv=384, group=8, num_buffers=4))
    with pytest.raises(ScheduleError, match="has 0 loops over groups, not two"):
        _decode_runs(attention_shape("qwen3-8b-decode"), DECODE)(schedule())


class TestCompiled:
    pytestmark = compiles

    def test_heads_of_64_cost_half_and_are_read_at_the_speed_of_hbm(self):
        result = measure("baton-attention", "v6e", "llama-3.2-1b-decode", None, 600)
        assert "error" not in result, result
        assert result["hbm_us"] < 0.51 * attention_shape("qwen3-8b-decode").hbm_bytes / 1638e9 * 1e6
        assert result["compute_over_hbm"] <= 0.8
