"""The plain model, which everything else is compared with."""

import math
from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.model import reference as plain_model
from tpipe_jax.model import transformer


def test_a_token_changes_its_own_and_all_later_logits_but_no_earlier_one() -> None:
    config = ModelConfig(num_layers=2, d_model=32, num_heads=2, vocab_size=29, seq_len=300)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(x + rng.normal(scale=0.3, size=x.shape), jnp.float32),
        transformer.init(config, jax.random.key(0)),
    )
    logits = partial(jax.jit(partial(plain_model.logits, config)), params)
    tokens = rng.integers(config.vocab_size, size=(1, config.seq_len))
    before = np.asarray(logits(tokens))
    # around the edges of the blocks, of 128 keys and 150 queries
    for t in [0, 1, 127, 128, 149, 150, 298, 299]:
        changed = tokens.copy()
        changed[0, t] = (changed[0, t] + 1) % config.vocab_size
        difference = np.abs(np.asarray(logits(changed)) - before)[0].max(-1)
        np.testing.assert_array_equal(difference[:t], 0, err_msg=f"token {t}")
        assert difference[t:].min() > 1e-4, f"token {t}"


def dense_attention(qkv_tBTHK: Array) -> Array:
    q, k, v = qkv_tBTHK
    _, T, _, K = q.shape
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(K)
    scores = jnp.where(np.tri(T, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores), v)


@pytest.mark.parametrize("num_tokens", [1, 7, 130, 300, 389])
def test_self_attention_has_the_value_and_gradient_of_dense_attention(num_tokens: int) -> None:
    normal = np.random.default_rng(0).normal
    qkv, d_out = (
        jnp.asarray(normal(scale=1.5, size=(*n, 2, num_tokens, 3, 5)), jnp.float32)
        for n in [(3,), ()]
    )

    @partial(jax.jit, static_argnums=0)
    def value_and_gradient(
        attention: Callable[[Array], Array], qkv: Array, d_out: Array
    ) -> tuple[Array, Array]:
        out, pull_back = jax.vjp(attention, qkv)
        return out, *pull_back(d_out)

    ours = value_and_gradient(lambda qkv: plain_model.self_attention(*qkv), qkv, d_out)
    expected = value_and_gradient(dense_attention, qkv, d_out)
    # both sum in float32, in different orders: some dozen roundings of values up to 15
    chex.assert_trees_all_close(ours, expected, rtol=0, atol=5e-5)
