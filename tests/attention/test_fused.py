"""A fused kernel's calls, merged, against float64; cuDNN's by what stands in for it on a CPU."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from support import fake_cudnn, reference
from support.drawn_slices import ROWS, TOLERANCE, B, arguments, draw, expect, rounded, run
from tpipe_jax.attention import backends
from tpipe_jax.attention.base import TOKENS_FIRST, KVCache
from tpipe_jax.attention.cudnn import cudnn_kernel
from tpipe_jax.attention.fused import Kernel, grouped
from tpipe_jax.config.settings import (
    AttentionConfig,
    Config,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PrecisionConfig,
    TrainConfig,
)
from tpipe_jax.devices.inplace import Position
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_rows, abstract_state
from tpipe_jax.training.step import make_train_step

fake_cudnn.register()
KERNEL = cudnn_kernel()
FEW = KERNEL._replace(min_tokens=1)
IN_GROUPS = {group: grouped(FEW, group) for group in (1, 4, 6, 100)}


@pytest.mark.parametrize("L", [64, 65, 130, 300])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_equals_float64_wherever_the_slice_lies(L: int, num_heads: int) -> None:
    attention = IN_GROUPS[100]
    for i, context in enumerate([0, 1, 99, 100, 101, 300]):
        s = draw(Position(i % (ROWS - B + 1), context), L, seed=i, num_heads=num_heads)
        reference.assert_close(run(s, attention), expect(s), TOLERANCE)


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # compiles each: no shrinking
@given(
    L=st.integers(1, 24),
    contexts=st.lists(st.integers(0, 24), min_size=1, max_size=8),
    group=st.sampled_from([1, 4, 6, 100]),
)
@example(L=1, contexts=[0, 1, 6, 7], group=6)
@pytest.mark.slow
def test_equals_float64_for_any_number_of_groups(L: int, contexts: list[int], group: int) -> None:
    for context in contexts:
        s = draw(Position(1, context), L, T=48)
        reference.assert_close(run(s, IN_GROUPS[group]), expect(s), TOLERANCE)


def test_scores_may_be_large() -> None:
    """As in test_attention, where their rounding is explained."""
    s = draw(Position(1, 300), L=130, scale=60)
    reference.assert_close(run(s, IN_GROUPS[100]), expect(s), 1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_formats(dtype: Any) -> None:
    """The output of each call is rounded to 2^-9 or 2^-12 and so are gradients of keys and values;
    the merged sums are not.
    """
    s = rounded(draw(Position(1, 300), L=200), dtype)
    got, want = run(s, IN_GROUPS[100], dtype), expect(s)
    assert all(a.dtype == dtype for a in (got.out, got.d_q, *got.d_kv))
    assert all(a.dtype == np.float32 for a in (got.lse, *got.d_cache))
    reference.assert_close(got.lse, want.lse, TOLERANCE)
    epsilon = float(jnp.finfo(dtype).eps)
    reference.assert_close(got._replace(lse=want.lse), want, 2 * epsilon)


@pytest.mark.parametrize("at", [Position(0, 0), Position(1, 5), Position(2, 129), Position(1, 300)])
def test_neither_later_tokens_nor_other_sequences_matter(at: Position) -> None:
    """All but the first group, which may be read in full, ends where the context does."""
    s = draw(at, L=130)

    def poison(a: np.ndarray) -> np.ndarray:
        poisoned = np.full_like(a, np.nan)
        poisoned[at.row : at.row + B, :, :100] = 1e9
        s.seen(poisoned)[...] = s.seen(a)
        return poisoned

    attention = IN_GROUPS[100]
    clean = run(s, attention)
    poisoned = run(s._replace(cache=KVCache(*map(poison, s.cache))), attention)
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    for before, after in zip(s.d_cache, clean.d_cache, strict=True):
        kept = after.copy()
        s.seen(kept)[...] = s.seen(before)
        np.testing.assert_array_equal(kept, before)


def test_a_whole_sequence_has_no_context_to_loop_over() -> None:
    s = draw(Position(1, 0), L=70, T=70)
    reference.assert_close(run(s, IN_GROUPS[100]), expect(s), TOLERANCE)
    own, _, _ = arguments(s, TOKENS_FIRST)
    assert "while" not in str(jax.make_jaxpr(IN_GROUPS[100].forward)(own))


def test_slices_too_short_for_the_kernel_are_attended_without_it() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("too short for the kernel")

    attention = grouped(Kernel(refuse, refuse, min_tokens=64), 100)
    for L in (1, 63):
        for context in (0, 70):
            s = draw(Position(1, context), L)
            reference.assert_close(run(s, attention), expect(s), TOLERANCE)
    with pytest.raises(AssertionError, match="too short"):
        run(draw(Position(0, 0), L=64), attention)


@pytest.mark.parametrize("num_visible", [None, 5])
def test_cudnn_is_called_as_jax_calls_it(
    num_visible: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the log-sum-exp and output that the backward pass is given."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91002)
    q, d_out = (jnp.full((2, 8, 3, 16), value, jnp.bfloat16) for value in (1, 2))
    visible = None if num_visible is None else jnp.int32(num_visible)

    def theirs(q: Array, k: Array, v: Array) -> Array:
        lengths = None, None
        if num_visible is not None:
            lengths = jnp.full(2, 8, jnp.int32), jnp.full(2, num_visible, jnp.int32)
        mask = cudnn.MaskType.CAUSAL if num_visible is None else cudnn.MaskType.PADDING
        return cudnn.dot_product_attention(
            q, k, v, None, None, *lengths, scale=0.25, mask_type=mask, qkv_layout="BTNH"
        )

    def of_jax(q: Array, d_out: Array) -> Any:
        _, vjp = jax.vjp(theirs, q, q, q)
        return vjp(d_out)

    def ours(q: Array, d_out: Array) -> Any:
        kv = KVCache(q, q)
        out, lse = KERNEL.forward(q, kv, visible)
        return KERNEL.backward(q, kv, visible, out, lse, d_out)

    def is_score_mod(name: str, value: Any) -> bool:
        assert not name.startswith("score_mod") or value is None
        return name.startswith("score_mod")

    def calls(function: Any) -> list[tuple[str, Any, Any]]:
        jaxpr = jax.make_jaxpr(function)(q, d_out)
        return [
            (
                e.primitive.name.removesuffix("_wrapper"),  # which divides it over devices
                # Since jax 0.12 a function of the scores has other names before it is traced.
                {n: v for n, v in e.params.items() if n != "seed" and not is_score_mod(n, v)},
                [v.aval for v in (*e.invars, *e.outvars)],
            )
            for e in jaxpr.eqns
            if "dot_product_attention" in e.primitive.name
        ]

    assert len(calls(ours)) == 2
    assert calls(ours) == calls(of_jax)


@pytest.mark.parametrize("L", [63, 64])
def test_cudnn_is_in_the_program_for_gpus(L: int) -> None:
    """Where the slice is long enough for it."""

    def text(function: Any, *args: Any) -> str:
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    own, d_out, d_cache = arguments(draw(Position(0, 70), L), TOKENS_FIRST, jnp.bfloat16)
    forward, backward, *_ = grouped(KERNEL, 128)
    results = jax.eval_shape(forward, own)
    for program in (text(forward, own), text(backward, own, *results, d_out, d_cache)):
        calls = [line for line in program.splitlines() if "custom_call @__cudnn" in line]
        masks = [("CAUSAL" in call, "PADDING" in call) for call in calls]
        assert masks == ([(True, False), (False, True)] if L == 64 else [])


def test_the_training_step_for_gpus_divides_sequences_and_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lowered for GPUs, which takes none."""
    monkeypatch.setattr(backends, "_obstacle", lambda *_: None)
    config = Config(
        ModelConfig(num_layers=2, d_model=64, num_heads=4, seq_len=512),
        MeshConfig(data=2, pipe=2, model=2),
        PlanConfig("uniform:4", "uniform:1"),
        TrainConfig(batch_size=4),
        precision=PrecisionConfig("bfloat16"),
        attention=AttentionConfig("cudnn", block=256),
    )
    spec = make_spec(config, make_mesh(config.mesh, jax.devices()))
    optimizer = make_optimizer(config)
    step = make_train_step(spec, make_schedule(reference.plan_of(config)), optimizer)
    args = abstract_state(spec, optimizer), abstract_rows(spec)
    text = step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$(\w+)\(.* : \((.*)\) ->", text)
    assert len(calls) == 4
    slice_, group = (f"tensor<2x{n}x2x16xbf16>" for n in (128, 256))
    for name, operands in calls:
        q, *kv = operands.split(", ")[:3]
        assert name.startswith("fmhaSoftmax")
        assert q == slice_
        assert kv in ([slice_] * 2, [group] * 2)


def test_the_stand_in_masks_as_cudnn_does() -> None:
    """From the top left, and whole columns."""
    q = jnp.zeros((1, 2, 1, 8))
    v = jnp.arange(3.0)[:, None, None] * jnp.ones(8)
    for mask, num_keys, expected in (("CAUSAL", 2, [0, 0.5]), ("PADDING", 3, [0.5, 0.5])):
        out, _ = fake_cudnn.forward(
            *(
                q,
                v[None, :num_keys],
                v[None, :num_keys],
                q,
                q,
                jnp.array([2]),
                *[q] * 4,
            ),
            scale=1.0,
            mask_type=cudnn.MaskType[mask],
            layout=0,
            dropout_rate=0,
            is_training=True,
        )
        np.testing.assert_allclose(out[0, :, 0, 0], expected)
