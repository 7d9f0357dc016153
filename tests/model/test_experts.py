"""Mixtures of experts, against each token's products written out one by one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpipe_jax.config.settings import Config, ModelConfig
from tpipe_jax.errors import UserError
from tpipe_jax.model import experts
from tpipe_jax.model.experts import Experts

MODEL = ModelConfig(
    num_layers=1, d_model=6, num_heads=2, d_ff=5, vocab_size=29, seq_len=16, family="llama",
    num_experts=5, experts_per_token=3,
)  # fmt: skip


def plain(x: jax.Array, logits: jax.Array, ff_in: jax.Array, ff_out: jax.Array, is_normed: bool):
    """All experts for all tokens; the products of those that are not chosen count zero times."""
    probabilities = jax.nn.softmax(logits, -1)
    chosen = jax.lax.top_k(probabilities, MODEL.experts_per_token)[1]
    is_chosen = (chosen[..., None] == jnp.arange(logits.shape[-1])).any(-2)
    weights = jnp.where(is_chosen, probabilities, 0)
    weights = weights / weights.sum(-1, keepdims=True) if is_normed else weights
    gate, value = jnp.split(jnp.einsum("bld,edf->blef", x, ff_in), 2, -1)
    y = jnp.einsum("blef,efd->bled", jax.nn.silu(gate) * value, ff_out)
    return (weights[..., None] * y).sum(-2)


def drawn(lean: float, shape: tuple[int, int] = (2, 13)) -> tuple[jax.Array, ...]:
    """Inputs, logits and kernels. With much `lean`, nearly all tokens want the same expert."""
    keys = jax.random.split(jax.random.key(0), 4)
    E, D, F = MODEL.num_experts, MODEL.d_model, MODEL.ff_width
    logits = jax.random.normal(keys[1], (*shape, E)) - lean * jnp.arange(E)
    return (
        jax.random.normal(keys[0], (*shape, D)),
        logits,
        jax.random.normal(keys[2], (E, D, 2 * F)),
        jax.random.normal(keys[3], (E, F, D)),
    )


def own(x: jax.Array, logits: jax.Array, ff_in: jax.Array, ff_out: jax.Array, is_normed: bool):
    model = replace(MODEL, norm_topk_prob=is_normed)
    graph, _ = nnx.split(
        nnx.eval_shape(lambda: Experts(model, jnp.dtype(jnp.float32), nnx.Rngs(0)))
    )
    return nnx.merge(graph, {"ff_in": ff_in, "ff_out": ff_out})(x, logits)


@pytest.mark.parametrize("is_normed", [True, False])
@pytest.mark.parametrize("lean", [0.0, 8.0], ids=["even", "uneven"])
def test_they_compute_what_is_written_out(lean: float, is_normed: bool, monkeypatch):
    """Also with so few places a round that there are several rounds, the last of them in part."""
    monkeypatch.setattr(experts, "PLACES", 1)
    monkeypatch.setattr(experts, "ROOM", 0.4)
    arguments = drawn(lean)
    ramp = jnp.cos(jnp.arange(arguments[0].size)).reshape(arguments[0].shape)

    def result_and_gradients(function):
        total = lambda *a: (ramp * function(*a, is_normed)).sum()  # noqa: E731
        return function(*arguments, is_normed), *jax.grad(total, (0, 1, 2, 3))(*arguments)

    for found, expected in zip(
        jax.jit(lambda: result_and_gradients(own))(), result_and_gradients(plain), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_a_token_depends_on_itself_alone():
    """However the tokens are cut into slices."""
    x, logits, *kernels = drawn(3.0)
    whole = own(x, logits, *kernels, True)
    parts = [own(x[:, a:b], logits[:, a:b], *kernels, True) for a, b in ((0, 1), (1, 6), (6, 13))]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts": 2}, "experts_per_token=3 is more than config.model.num_experts=2"),
        ({"num_experts": None}, "experts_per_token=3 is for mixtures of experts"),
        (
            {"num_experts": None, "experts_per_token": None, "norm_topk_prob": False},
            "norm_topk_prob=False is for mixtures of experts",
        ),
        ({"family": "gpt2"}, "num_experts=5 is nothing that gpt2 has"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        Config(replace(MODEL, **changes))


def test_places_without_a_token_overflow_nothing():
    """An expert whose products overflow for tokens that have not chosen it."""
    x, logits, ff_in, ff_out = drawn(0.0)
    logits = logits.at[..., 0].set(-9.0).at[0, 0, 0].set(9.0)  # one token for expert 0
    x = x.at[0, 0].set(0.0)
    half = [a.astype(jnp.float16) for a in (x, ff_in.at[0].multiply(3e4), ff_out)]

    def total(x, ff_in, ff_out):
        model = replace(MODEL, norm_topk_prob=True)
        graph, _ = nnx.split(
            nnx.eval_shape(lambda: Experts(model, jnp.dtype(jnp.float16), nnx.Rngs(0)))
        )
        return nnx.merge(graph, {"ff_in": ff_in, "ff_out": ff_out})(x, logits).sum()

    for gradient in jax.grad(total, (0, 1, 2))(*half):
        assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_logits_are_rounded_wherever_they_are_used():
    """XLA may keep them in float32 where it computes them: the rounding is part of the text."""
    text = str(jax.make_jaxpr(experts.probabilities)(jnp.zeros((2, 3), jnp.bfloat16)))
    assert "reduce_precision[exponent_bits=8 mantissa_bits=7]" in text
