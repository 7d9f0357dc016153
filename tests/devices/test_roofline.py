"""Times of programs in which operations and bytes are known."""

import pytest

from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices.hlo import read
from tpipe_jax.devices.roofline import Cost, Roofline, Seen
from tpipe_jax.devices.speeds import NVLINK_LATENCY, Link, Network, Speed, speed_of
from tpipe_jax.devices.targets import GPUS

# In a second there are 1000 operations, and 100 bytes are moved. A kernel takes 1 s, a question 10.
SPEED = Speed(1000.0, 100.0, 10.0, 1.0, True, 4.0, 0.5, 0.25, kernel_seconds=1, question_seconds=10)
SEEN = Seen(num_rows=2, num_tokens=4, context=12, group=8)

FUSED = """
%double (p: f32[10,5]) -> f32[10,5] {
  %p = f32[10,5] parameter(0)
  ROOT %a = f32[10,5] add(%p, %p)
}
%product (l: f32[10,5], r: f32[5,20]) -> f32[10,20] {
  %l = f32[10,5] parameter(0)
  %r = f32[5,20] parameter(1)
  ROOT %d = f32[10,20] dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%in_place (b: f32[1000,5], u: f32[10,5], i: s32[]) -> f32[1000,5] {
  %b = f32[1000,5] parameter(0)
  %u = f32[10,5] parameter(1)
  %i = s32[] parameter(2)
  %t = f32[1000,5] bitcast(%b)
  ROOT %d = f32[1000,5] dynamic-update-slice(%t, %u, %i, %i)
}
%a_slice (b: f32[1000,5], i: s32[]) -> f32[10,5] {
  %b = f32[1000,5] parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[10,5] dynamic-slice(%b, %i, %i), dynamic_slice_sizes={10,5}
}
%sums (b: f32[64,5], u: f32[64,5], i: s32[64]) -> f32[64,5] {
  %b = f32[64,5] parameter(0)
  %u = f32[64,5] parameter(1)
  %i = s32[64] parameter(2)
  ROOT %s = f32[64,5] scatter(%b, %i, %u), to_apply=%double
}
%turn (t: f32[10,5]) -> f32[10,5] {
  %t = f32[10,5] parameter(0)
  ROOT %f = f32[10,5] fusion(%t), kind=kLoop, calls=%double
}
%condition (t: f32[10,5]) -> pred[] {
  %t = f32[10,5] parameter(0)
  ROOT %c = pred[] constant(true)
}
%nothing (t: f32[10,5]) -> f32[10,5] {
  ROOT %t = f32[10,5] parameter(0)
}
"""


def cost(*lines: str) -> Cost:
    """The cost of a program with these operations."""
    body = "\n".join(f"  {line}" for line in ("%p = f32[10,5] parameter(0)", *lines))
    program = read(f"{FUSED}\nENTRY %main (p: f32[10,5]) -> f32[10,5] {{\n{body}\n}}")
    return Roofline(program, SPEED, Link(10.0, 3.0), SEEN).cost("main")


DOUBLE = "%f = f32[10,5] fusion(%p), kind=kLoop, calls=%double"
DOUBLED = 2 * 4 * 50 / 100  # seconds for reading and writing 50 numbers


def test_a_kernel_takes_the_longer_of_its_operations_and_its_bytes():
    assert cost(DOUBLE) == Cost(other=DOUBLED, kernels=1)
    right = "%r = f32[5,20] parameter(1)"
    product = cost(right, "%f = f32[10,20] fusion(%p, %r), kind=kCustom, calls=%product")
    moved = 4 * (50 + 100 + 200) / 100
    assert product == Cost(products=moved, kernels=1)
    assert moved > 2 * 10 * 20 * 5 / 1000
    fast = SPEED._replace(bytes_per_second=1e9)
    program = read(
        f"{FUSED}\nENTRY %main (p: f32[10,5]) -> f32[10,20] {{\n  %p = f32[10,5] parameter(0)\n"
        f"  {right}\n  ROOT %f = f32[10,20] fusion(%p, %r), kind=kCustom, calls=%product\n}}"
    )
    found = Roofline(program, fast, Link(10.0, 3.0), SEEN).cost("main")
    assert found.products == pytest.approx(2 * 10 * 20 * 5 / 1000)
    assert found.seconds(fast) == pytest.approx(2 * 10 * 20 * 5 / 1000 + 1)


def test_products_of_the_library_count_without_their_scratch_memory():
    found = cost(
        "%r = f32[5,20] parameter(1)",
        '%g = (f32[10,20], s8[4000000]) custom-call(%p, %r), custom_call_target="__cublas$gemm", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
    )
    assert found == Cost(products=4 * (50 + 100 + 200) / 100, kernels=1)


def test_slices_count_and_not_the_buffers_that_they_are_part_of():
    buffer, i = "%b = f32[1000,5] parameter(1)", "%i = s32[] parameter(2)"
    written = cost(buffer, i, "%f = f32[1000,5] fusion(%b, %p, %i), kind=kLoop, calls=%in_place")
    assert written.other == pytest.approx((2 * 4 * 50 + 4) / 100)
    read_ = cost(buffer, i, "%f = f32[10,5] fusion(%b, %i), kind=kLoop, calls=%a_slice")
    assert read_.other == pytest.approx((2 * 4 * 50 + 4) / 100)
    plain = cost(buffer, i, "%f = f32[1000,5] dynamic-update-slice(%b, %p, %i, %i)")
    assert plain == Cost(other=2 * 4 * 50 / 100, kernels=1)


def test_sums_of_the_context_skip_what_is_beyond():
    """12 of 32 tokens of each of two sequences."""
    lines = "%b = f32[64,5] parameter(1)", "%i = s32[64] parameter(2)"
    found = cost(*lines, "%f = f32[64,5] fusion(%b, %b, %i), kind=kInput, calls=%sums")
    whole = (3 * 4 * 64 * 5 + 4 * 64) / 100
    assert found.other == pytest.approx(whole * 2 * 12 / 64)


def test_loops_count_as_often_as_they_turn():
    loop = "%w = f32[10,5] while(%p), condition=%condition, body=%turn"
    known = cost(loop + ', backend_config={"known_trip_count":{"n":"7"}}')
    assert known == Cost(other=7 * DOUBLED, kernels=7)
    unknown = cost(loop)
    assert unknown == Cost(other=DOUBLED, kernels=1, questions=2)
    over_context = cost(loop + ', metadata={op_name="jit(f)/over_context/while"}')
    assert over_context.other == 2 * DOUBLED
    assert over_context.questions == 1 + 2


def test_a_conditional_counts_as_its_larger_branch_and_asks_the_host():
    found = cost(
        "%c = pred[] parameter(1)",
        "%s = f32[10,5] conditional(%c, %p, %p), true_computation=%turn, "
        "false_computation=%nothing",
    )
    assert found == Cost(other=DOUBLED, kernels=1, questions=1)
    assert found.seconds(SPEED) == pytest.approx(DOUBLED + 1 + 10)


@pytest.mark.parametrize(
    ("kind", "times"), [("all-reduce", 2), ("all-gather", 1), ("collective-permute", 1)]
)
def test_exchanges_take_their_bytes_and_a_latency(kind: str, times: int):
    found = cost(f"%e = f32[10,5] {kind}(%p), replica_groups={{{{0,1}}}}, to_apply=%double")
    assert found == Cost(exchanges=times * 200 / 10 + 3, kernels=1)
    alone = cost("%e = f32[10,5] all-reduce(%p), replica_groups={{0},{1}}, to_apply=%double")
    assert alone.exchanges == 0


def test_attention_follows_what_the_slice_sees():
    """FlashAttention sees the context and half of the slice; cuDNN has a call for each."""
    flash = (
        "%q = bf16[8,2,16] parameter(1)",
        "%k = bf16[64,2,16] parameter(2)",
        "%a = (bf16[8,2,16], f32[2,8]) custom-call(%q, %k, %k), "
        'custom_call_target="dew_flash3_mha_varlen_fwd"',
    )
    seconds = 4 * 8 * 32 * (12 + 4 / 2) / (0.5 * 1000) + (2 * 256 + 4 * 16) / 100
    assert cost(*flash) == Cost(attention=pytest.approx(seconds), kernels=4)
    backward = cost(*flash[:2], flash[2].replace("_fwd", "_bwd"))
    assert backward.attention == pytest.approx(
        10 * 8 * 32 * (12 + 4 / 2) / (0.25 * 1000) + (2 * 256 + 4 * 16) / 100
    )

    def cudnn(num_keys: int, name: str = "__cudnn$fmhaSoftmax") -> float:
        return cost(
            "%q = bf16[2,4,2,16] parameter(1)",
            f"%k = bf16[2,{num_keys},2,16] parameter(2)",
            f'%a = (bf16[2,4,2,16], s8[999]) custom-call(%q, %k, %k), custom_call_target="{name}"',
        ).attention

    written = 2 * 256 / 100
    assert cudnn(4) == pytest.approx(4 * 256 * 2 / 500 + written)
    assert cudnn(32) == pytest.approx(4 * 256 * 12 / 500 + written)
    assert cudnn(8) == pytest.approx(
        4 * 256 * 6 / 500 + written
    )  # one of two turns: 8 keys, 4 keys
    assert cudnn(4, "__cudnn$fmhaSoftmaxBackward") == pytest.approx(10 * 256 * 2 / 250 + written)


def test_values_come_from_the_host_during_work_and_go_there_after_it():
    buffer, value = "bf16[2,64,8]{2,1,0:S(5)}", "bf16[1,4,8]{2,1,0}"  # 64 bytes, 16 s
    there = f"(({buffer}, {value}, s32[]), {buffer}, u32[]) fusion-start(%b, %v, %n), calls=%double"
    back = f"(({buffer}, s32[]), {value}, u32[]) fusion-start(%b, %n), kind=kLoop, calls=%double"
    assert cost(f"%dynamic-update-slice-start = {there}") == Cost(kernels=1, to_host=16)
    assert cost(f"%dynamic-slice-start = {back}") == Cost(kernels=1, from_host=16)
    work = Cost(other=20, kernels=1)
    assert (work + Cost(from_host=16)).seconds(SPEED) == 21
    assert (work + Cost(from_host=30)).seconds(SPEED) == 30
    assert (work + Cost(to_host=16)).seconds(SPEED) == 37


def test_costs_add_up():
    some = Cost(1, 2, 3, 4, 5, 6)
    assert some + some.times(2) == some.times(3) == Cost(3, 6, 9, 12, 15, 18)
    assert some.seconds(SPEED) == 1 + 2 + 3 + 4 + 5 * 1 + 6 * 10


def test_every_gpu_has_a_speed():
    """Below what the maker states, and more than half of it."""
    for name in GPUS:
        speed = speed_of(name)
        assert 0.8 < speed.bytes_per_second / GPUS[name].bandwidth < 1
        assert 50e12 < speed.product_flops < 2000e12
        assert speed.is_measured == (name in ("h100", "h200"))
    assert speed_of("v100").product_flops < speed_of("a100").product_flops


def test_neighbours_of_other_hosts_share_the_network():
    """The axis that comes last in config.mesh.order has its neighbours in a host."""
    network, speed = Network(8, 80.0, 5.0), SPEED
    inside = Link(10.0, NVLINK_LATENCY)
    found = network.links(speed, MeshConfig(data=2, pipe=4, model=4))
    assert found == {"model": inside, "data": inside, "pipe": Link(10.0, 5.0)}
    found = network.links(speed, MeshConfig(data=4, pipe=2, model=4))
    assert found == {"model": inside, "data": Link(20.0, 5.0), "pipe": Link(10.0, 5.0)}
    found = network.links(speed, MeshConfig(data=1, pipe=16, model=1))
    assert found["pipe"] == Link(80.0, 5.0)  # one GPU of each host sends to the next host
    found = network.links(speed, MeshConfig(data=1, pipe=8, model=1))
    assert found["pipe"] == inside
    found = network.links(speed, MeshConfig(data=8, pipe=2, model=1, order="data,model,pipe"))
    assert found == {"pipe": inside, "model": inside, "data": Link(40.0, 5.0)}
