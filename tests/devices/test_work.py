"""Kernels, copies and exchanges of programs in which they are known."""

from collections import Counter

from tpipe_jax.devices.hlo import read
from tpipe_jax.devices.work import Work, work_of


def work(body: str, more: str = "") -> Work:
    """The work of a program with these operations, and other computations."""
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return work_of(read(f"{more}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{lines}\n}}"), "main")


FUSED = """
%add (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  ROOT %a = f32[4] add(%p, %p)
}
%two_copies (p: f32[4]) -> (f32[4], f32[4]) {
  %p = f32[4] parameter(0)
  %c.1 = f32[4] copy(%p)
  %c.2 = f32[4] copy(%p)
  ROOT %t = (f32[4], f32[4]) tuple(%c.1, %c.2)
}
%zeros (z: f32[]) -> f32[4] {
  %z = f32[] parameter(0)
  ROOT %b = f32[4] broadcast(%z), dimensions={}
}
%turn (t: f32[4]) -> f32[4] {
  %t = f32[4] parameter(0)
  %f = f32[4] fusion(%t), kind=kLoop, calls=%add
  ROOT %c = f32[4] copy(%f)
}
%computes (t: f32[4]) -> f32[4] {
  %t = f32[4] parameter(0)
  ROOT %f = f32[4] fusion(%t), kind=kLoop, calls=%add
}
%nothing (t: f32[4]) -> f32[4] {
  ROOT %t = f32[4] parameter(0)
}
%copies (t: f32[4]) -> f32[4] {
  %t = f32[4] parameter(0)
  ROOT %c = f32[4] copy(%t)
}
"""


def test_kernels_and_what_is_none():
    body = """
        %p = f32[4] parameter(0)
        %f = f32[4] fusion(%p), kind=kLoop, calls=%add
        %b = f32[2,2] bitcast(%f)
        %g = (f32[4], u8[64]) custom-call(%f), custom_call_target="__cublas$gemm"
        %e = f32[4] get-tuple-element(%g), index=0
        %s = f32[4] fusion-start(%e), calls=%add
        %d = f32[4] fusion-done(%s)
        ROOT %t = (f32[4]) tuple(%d)
    """
    assert work(body, FUSED) == Work(kernels=3)


def test_copies_also_those_in_fusions():
    body = """
        %p = f32[4] parameter(0)
        %c = f32[4] copy(%p)
        %s = (f32[4], f32[4], u32[]) copy-start(%c)
        %d = f32[4] copy-done(%s)
        ROOT %f = (f32[4], f32[4]) fusion(%d), kind=kLoop, calls=%two_copies
    """
    assert work(body, FUSED) == Work(copies=4, copied_bytes=64)


def test_zeros_in_several_places_and_loads_into_a_core_are_no_copies():
    body = """
        %p = f32[4] parameter(0)
        %z = f32[] constant(0)
        %f = f32[4] fusion(%z), kind=kLoop, calls=%zeros
        %c = f32[4] copy(%f)
        %l = (f32[4]{0:S(1)}, f32[4], u32[]) copy-start(%p)
        ROOT %d = f32[4]{0:S(1)} copy-done(%l)
    """
    assert work(body, FUSED) == Work(kernels=2)


def test_loops_count_as_often_as_they_turn_and_else_once():
    known = """
        %p = f32[4] parameter(0)
        ROOT %w = f32[4] while(%p), condition=%c, body=%turn, \
            backend_config={"known_trip_count":{"n":"5"}}
    """.replace("\\\n", "")
    assert work(known, FUSED) == Work(kernels=5, copies=5, copied_bytes=80)
    unknown = "ROOT %w = f32[4] while(%p), condition=%c, body=%turn"
    assert work(unknown, FUSED) == Work(kernels=1, copies=1, copied_bytes=16)


def conditional(name: str, scope: str, branches: str = "%turn, %nothing") -> str:
    return (
        f"%{name} = f32[4] conditional(%i, %p, %p), branch_computations={{{branches}}}, "
        f'metadata={{op_name="jit(f)/{scope}/cond"}}'
    )


def test_of_a_conditional_the_larger_branch_counts():
    assert work(conditional("c", "any"), FUSED) == Work(kernels=1, copies=1, copied_bytes=16)
    both = conditional("c", "any") + "\n" + conditional("d", "any")
    assert work(both, FUSED) == Work(kernels=2, copies=2, copied_bytes=32)


def test_of_slices_of_several_lengths_one_is_due():
    both = conditional("c", "slice_body") + "\n" + conditional("d", "slice_body")
    assert work(both, FUSED) == Work(kernels=1, copies=1, copied_bytes=16)
    # But what those copy that are not due counts as well.
    alone = work(conditional("c", "slice_body", "%computes, %copies"), FUSED)
    assert (alone.kernels, alone.copies) == (1, 1)  # the copy where none is due
    idle = "%turn, %copies"
    both = conditional("c", "slice_body", idle) + "\n" + conditional("d", "slice_body", idle)
    assert work(both, FUSED) == Work(kernels=1, copies=2, copied_bytes=32)
    loop = (
        '%{} = f32[4] while(%p), condition=%c, body=%turn, metadata={{op_name="slice_body/while"}}'
    )
    loop = loop.replace("slice_body", "f/slice_body")
    assert work(loop.format("v") + "\n" + loop.format("w"), FUSED).kernels == 1


def test_exchanges():
    body = """
        %p = f32[4] parameter(0)
        %o = f32[4] all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add
        %r = (f32[4], f32[2]) all-reduce(%p, %q), replica_groups={}, to_apply=%add
        %s = (f32[4], f32[8]) all-gather-start(%p), replica_groups={{0,1}}, dimensions={0}
        %d = f32[8] all-gather-done(%s)
        %t = (f32[4], f32[4], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
        %u = f32[4] all-reduce-start(%p), replica_groups={}, to_apply=%add
        %w = ((f32[4], f32[2]), (f32[4], f32[2])) all-reduce-start(%p, %q), to_apply=%add
        %v = ((f32[4], f32[4]), (f32[2], f32[2])) reduce-scatter-start(%p, %q), dimensions={0}
        ROOT %e = f32[4] collective-permute-done(%t)
    """
    found = work(body, FUSED)
    one = {"all-gather": 1, "collective-permute": 1, "reduce-scatter": 1}
    assert found.exchanges == {"all-reduce": 3} | one
    expected = {"all-gather": 32, "collective-permute": 16, "reduce-scatter": 16}
    assert found.exchanged_bytes == {"all-reduce": 24 + 16 + 24} | expected
    assert (found.kernels, found.copied_bytes) == (7, 0)  # one of them on each device alone


def test_works_are_added():
    one = Work(1, 2, 3, Counter({"all-reduce": 1}), Counter({"all-reduce": 8}))
    assert one + one == one.times(2)
    assert (one + one).or_more(one) == one.times(2)
