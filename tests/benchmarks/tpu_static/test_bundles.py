"""The reader of schedules, on a listing small enough to count by hand."""

from pathlib import Path

import pytest

from benchmarks.tpu_static.bundles import ScheduleError, read_schedules

# 0: once | 1..16: outer loop, with 6..13 its inner loop, of which 7..11 may skip (branch at 7, delay slots 8..11: none)
LISTING = """\
= control target key start
LH: loop header

     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: bf16[8,128]] }
   0x1 LB: > { %s1 = sadd.s32 1, %s0 }
   0x2   : > {}
   0x3   : > { %20 = dma.hbm_to_vmem [thread:$0]  (!%p9), /*hbm=*/%s6, /*size_in_granules=*/64, /*vmem=*/%s2 }
   0x4   : > { %21 = dma.hbm_to_vmem [thread:$0]  (!%p9), /*hbm=*/%s6, /*size_in_granules=*/%s7, /*vmem=*/%s2 }
   0x5   : > { %22 = dma.done.wait (%p7), %s1, 64 /* wait */ }
   0x6 LB: >> { %v1 = vld [vmem:[%s1]] ;;  %31 = sbr.rel (%p4) target bundleno = 13 (0xd), region = 3 }
   0x7   : >> { %v2 = vmatmul.mubr.bf16.gmra.mxu0 %v1  ;;  %v3 = vmatmul.mubr.bf16.gmra.mxu1 %v1 }
   0x8   : >> {}
   0x9   : >> {}
   0xa   : >> {}
   0xb   : >> { %32 = vst [vmem:[#allocation3_spill]] %v2 }
   0xc   : >> { %33 = shalt.err (!%p5) /* for %9 = dma.hbm_to_vmem [x], /*size_in_granules=*/64 */ }
   0xd   : >> { %40 = sbr.rel (!%p2) target bundleno = 6 (0x6), region = 4 }
   0xe   : >> {}
   0xf   : >> {}
  0x10   : >> {}
  0x11   : >> {}
  0x12   : > { %50 = sbr.rel (!%p3) target bundleno = 1 (0x1), region = 5 }
  0x13   : > {}
  0x14   : > {}
  0x15   : > {}
  0x16   : > {}
  0x17   :  { %60 = vsyncmov [#allocation5] }
"""
NUM_BUNDLES = 24
#        MATMUL MATPUSH XLU VALU VPOP EUP VLOAD FILL VSTORE SPILL SALU
CAPACITY = "2 2 2 4 2 1 3 3 2 2 2"
USE = {
    0x1: "0 0 0 0 0 0 0 0 0 0 1",
    0x6: "0 0 0 0 0 0 1 1 0 0 1",
    0x7: "2 0 0 0 0 0 0 0 0 0 0",
    0xB: "0 0 0 0 0 0 0 0 1 1 0",
}
NONE = "0 0 0 0 0 0 0 0 0 0 0"
MEMORY = """\
  #allocation3 [shape = 'f32[512,1024]', space=vmem, size = 0x200000, offset = 0, scoped, tag = 'scratch operand']
  #allocation4 [shape = 'u8[4096]{0}', space=vmem, size = 0x1000, offset = 0x200000, scoped, tag = 'window']
  #allocation5 [shape = 's32[2]{0}', space=sflag, size = 0x8, offset = 0x4, scoped, tag = 'semaphores']
  #allocation6_spill [shape = 'u32[1]{0}', space=smem, size = 0x4, offset = 0, scoped, tag = 'spilled sreg/preg']
"""


def write_dump(directory: Path, listing: str = LISTING, rows: int = NUM_BUNDLES, stem: str = "17-mine.1") -> Path:
    header = "MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
    use = "\n".join(USE.get(address, NONE) for address in range(rows))
    table = f"\n== CAPACTIY:\n{header}\n    {CAPACITY}\n== UTILIZATION:\n{use}\n"
    (directory / f"{stem}-02-packed-bundles-post-ra.txt").write_text(listing)
    (directory / f"{stem}-03-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(table)
    (directory / f"{stem}-04-post-delay-converter.txt").write_text(MEMORY)
    (directory / f"{stem}-01-schedule-analysis_packed-bundles-post-ra.txt").write_text("not a listing")
    return directory


def test_loops_and_their_own_cycles(tmp_path):
    (schedule,) = read_schedules(write_dump(tmp_path))
    outer, inner = schedule.loops
    assert schedule.name == "mine.1"
    assert (schedule.cycles, schedule.outside.cycles) == (24, 2)
    assert (outer.start, outer.stop, outer.depth, outer.parent) == (1, 23, 0, None)
    assert (inner.start, inner.stop, inner.depth, inner.parent) == (6, 18, 1, 0)
    assert (outer.own.cycles, inner.own.cycles) == (10, 12)
    assert (outer.body_cycles, inner.body_cycles) == (22, 12)
    assert schedule.hot_loop() is inner


def test_what_a_body_does(tmp_path):
    (schedule,) = read_schedules(write_dump(tmp_path))
    outer, inner = (loop.own for loop in schedule.loops)
    assert (inner.vmatmuls, inner.spills, inner.fills, inner.checks, inner.stalls) == (2, 1, 1, 1, 7)
    assert (outer.vmatmuls, outer.waits, outer.stalls) == (0, 1, 5)
    assert [(dma.direction, dma.num_bytes) for dma in outer.dmas] == [("hbm_to_vmem", 64 * 32), ("hbm_to_vmem", None)]
    assert schedule.occupancy(inner)["MATMUL"] == pytest.approx(2 / (2 * 12))
    assert schedule.occupancy(inner)["SALU"] == pytest.approx(1 / (2 * 12))


def test_skippable_regions_start_behind_the_delay_slots(tmp_path):
    (schedule,) = read_schedules(write_dump(tmp_path))
    outer, inner = schedule.loops
    assert outer.regions == ()
    assert [(region.start, region.stop, region.cycles) for region in inner.regions] == [(11, 13, 2)]


def test_memory_by_space(tmp_path):
    (schedule,) = read_schedules(write_dump(tmp_path))
    assert (schedule.vmem_bytes, schedule.smem_bytes) == (0x201000, 4)


def test_kernels_come_in_the_order_of_their_compilation_and_the_program_is_left_out(tmp_path):
    for stem in ("18-second.1", "17-first.1", "19-TLP", "19-<late-finalization>"):
        write_dump(tmp_path, stem=stem)
    assert [schedule.name for schedule in read_schedules(tmp_path)] == ["first.1", "second.1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": NUM_BUNDLES - 1}, "24 bundles but 23 rows"),
        ({"listing": LISTING.replace("   0x8 ", "   0x9 ")}, "bundles but"),
    ],
)
def test_an_unknown_format_is_refused(tmp_path, change, message):
    with pytest.raises(ScheduleError, match=message):
        read_schedules(write_dump(tmp_path, **change))


def test_a_missing_file_is_named(tmp_path):
    write_dump(tmp_path)
    next(tmp_path.glob("*utilization.txt")).unlink()
    with pytest.raises(ScheduleError, match="utilization"):
        read_schedules(tmp_path)


def test_older_compilers_have_one_column_for_the_mxu(tmp_path):
    directory = write_dump(tmp_path)
    table = next(directory.glob("*utilization.txt"))
    rows = table.read_text().replace("MATMUL, MATPUSH", "MXU").splitlines()
    cut = [" ".join(row.split()[:1] + row.split()[2:]) if row[:1] in "012 " and row.strip() else row for row in rows]
    table.write_text("\n".join(cut))
    (schedule,) = read_schedules(directory)
    inner = schedule.loops[1].own
    assert schedule.capacity["MATMUL"] == 2 and "MATPUSH" not in schedule.capacity
    assert schedule.occupancy(inner)["MATMUL"] == pytest.approx(2 / (2 * 12))
    assert (inner.spills, inner.fills) == (1, 1)
