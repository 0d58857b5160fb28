"""Collectives, counted in the text of compiled programs."""

from engine_core.aot.hlo import Collective, count_collectives

# As v6e writes it: synchronous, the layers in a while loop.
SCANNED = """\
HloModule jit_local, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%body.1 (p: (s32[], bf16[128,4096])) -> (s32[], bf16[128,4096]) {
  %p = (s32[]{:T(128)}, bf16[128,4096]{1,0}) parameter(0)
  %psum.1 = bf16[128,4096]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %psum.2 = bf16[128,4096]{1,0} all-reduce(%psum.1), channel_id=2, to_apply=%add
}

%cond.1 (q: (s32[], bf16[128,4096])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36), metadata={op_name="x"}
  %q = (s32[]{:T(128)}, bf16[128,4096]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%index, %limit), direction=LT
}

%unused (r: f32[]) -> f32[] {
  %lonely = f32[1024]{0} all-gather(%r), dimensions={0}
}

ENTRY %main (tokens: s32[128]) -> f32[128,151936] {
  %tokens = s32[128]{0} parameter(0)
  %loop = (s32[], bf16[128,4096]) while(%init), condition=%cond.1, body=%body.1, metadata={op_name="while"}
  ROOT %logits = f32[128,151936]{0,1:T(8,128)} all-gather(%local), channel_id=3, dimensions={1}
}
"""

# As tpu7x writes it: a collective runs in a computation of its own, started and awaited.
ASYNCHRONOUS = """\
%wrapped (p.1: bf16[128,4096]) -> bf16[128,4096] {
  %p.1 = bf16[128,4096]{1,0} parameter(0)
  ROOT %all-reduce.13 = bf16[128,4096]{1,0} all-reduce(%p.1), channel_id=1, to_apply=%add
}

%branch (p.2: f32[8]) -> f32[32] {
  %gather-start = (f32[8]{0}, f32[32]{0}) all-gather-start(%p.2), dimensions={0}
  ROOT %gather-done = f32[32]{0} all-gather-done(%gather-start)
}

%called_computation.1 (p.3: bf16[16,256], p.4: token[]) -> bf16[32,256] {
  %p.3 = bf16[16,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ragged-all-to-all.2 = bf16[32,256]{1,0:T(8,128)(2,1)} ragged-all-to-all(%p.3), replica_groups={{0,4}}
}

ENTRY %main (t: s32[128]) -> f32[128] {
  %t = s32[128]{0} parameter(0)
  %call-start = ((bf16[16,256]{1,0}, token[]), bf16[32,256]{1,0}) call-start(%t), to_apply=%called_computation.1
  %call-done = bf16[32,256]{1,0} call-done(%call-start)
  %start = ((), (), (s32[114688]{0})) custom-call-start(%t), calls=%wrapped
  %done = bf16[128,4096]{1,0} custom-call-done(%start)
  ROOT %choice = f32[32] conditional(%c, %x, %y), branch_computations={%branch, %branch}
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    assert count_collectives(SCANNED) == {
        "all-gather": Collective(count=1, num_bytes=128 * 151936 * 4, largest_bytes=128 * 151936 * 4),
        "all-reduce": Collective(count=72, num_bytes=72 * 128 * 4096 * 2, largest_bytes=128 * 4096 * 2),
    }


def test_started_and_awaited_counts_once():
    found = count_collectives(ASYNCHRONOUS)
    assert found["all-reduce"].count == 1
    assert found["ragged-all-to-all"] == Collective(count=1, num_bytes=32 * 256 * 2, largest_bytes=32 * 256 * 2)
    assert found["all-gather"] == Collective(count=2, num_bytes=2 * 32 * 4, largest_bytes=32 * 4)


def test_a_program_without_collectives():
    assert count_collectives("ENTRY %main (t: s32[1]) -> s32[1] {\n  ROOT %t = s32[1]{0} parameter(0)\n}\n") == {}
