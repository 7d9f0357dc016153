"""Norms folded into the linear layers that read them: the same block, and the same gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from support import reference
from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.model.block import no_tape
from tpipe_jax.model.folding import fold, unfold_gradients
from tpipe_jax.model.functional import block_functions, init_block

CONFIG = ModelConfig(num_layers=1, d_model=12, num_heads=2, d_ff=20)
BLOCK = block_functions(CONFIG, jnp.dtype(jnp.float32))
TOLERANCE = 5e-6  # sums of 20 terms, rounded to 6e-8 each, in both orders


def drawn() -> Any:
    """Parameters whose norms matter: scales around 1, also negative ones and a zero, and biases."""
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(random.normal(0, 0.5, a.shape), jnp.float32),
        init_block(CONFIG, jax.random.key(0)),
    )
    scale = params["norm_1"]["scale"]
    return params | {"norm_1": params["norm_1"] | {"scale": scale.at[0].set(0).at[1].set(-1)}}


def outputs(params: Any, x_BLD: Array) -> tuple[Array, ...]:
    qkv = BLOCK.qkv(params, x_BLD, jnp.arange(5)[None], no_tape)
    return (*qkv, BLOCK.finish(params, x_BLD, qkv[2], no_tape))


X_BLD = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 12)), jnp.float32)


def test_a_folded_block_computes_the_same():
    params = drawn()
    folded = fold(BLOCK.norms, params)
    for name in BLOCK.norms:
        np.testing.assert_array_equal(folded[name]["scale"], 1)
        np.testing.assert_array_equal(folded[name]["bias"], 0)
    assert folded["attn_out"] is params["attn_out"]
    reference.assert_close(outputs(folded, X_BLD), outputs(params, X_BLD), TOLERANCE)


def test_gradients_are_unfolded():
    """Of a weighted sum of all outputs, against autodiff through the norms."""
    params = drawn()
    weights = [jnp.cos(jnp.arange(a.size).reshape(a.shape)) for a in outputs(params, X_BLD)]

    def loss(params: Any) -> Array:
        found = outputs(params, X_BLD)
        return sum(((a * w).sum() for a, w in zip(found, weights, strict=True)), jnp.float32(0))

    of_folded = jax.grad(loss)(fold(BLOCK.norms, params))
    known = {name: d for name, d in of_folded.items() if name not in BLOCK.norms}
    got = unfold_gradients(BLOCK.norms, params, known)
    expected = jax.grad(loss)(params)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    reference.assert_close(got, expected, TOLERANCE)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_norm_without_a_bias_leaves_the_layer_s_bias(has_bias: bool):
    scale, kernel = jnp.array([2.0, 3.0]), jnp.array([[1.0, 4.0, 5.0], [6.0, 7.0, 8.0]])
    bias = {"bias": jnp.ones(3)} if has_bias else {}
    params = {"norm": {"scale": scale}, "linear": {"kernel": kernel, **bias}}
    folded = fold({"norm": "linear"}, params)
    np.testing.assert_array_equal(folded["linear"]["kernel"], [[2, 8, 10], [18, 21, 24]])
    assert folded["linear"].keys() == params["linear"].keys()
    if has_bias:
        np.testing.assert_array_equal(folded["linear"]["bias"], 1)
