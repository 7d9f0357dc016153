"""Operations of a slice, beside those that XLA counts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.model import transformer
from tpipe_jax.model.block import no_tape
from tpipe_jax.model.flops import forward_flops
from tpipe_jax.model.functional import block_functions

Params = Any  # nested dictionaries and lists of arrays


def test_flops_of_one_token_are_those_that_xla_counts() -> None:
    config = ModelConfig(num_layers=1, d_model=128, num_heads=2, d_ff=200)
    context = 900  # its attention then costs more than the matrices of the block
    block = block_functions(config, jnp.float32)

    def layer(params: Params, x_BLD: Array, cache_kvBCHK: Array) -> Array:
        q, *kv = block.qkv(params, x_BLD, jnp.array([[context]]), no_tape)
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(cache_kvBCHK, kv, strict=True))
        weight = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k))
        return block.finish(params, x_BLD, jnp.einsum("bhqk,bkhe->bqhe", weight, v), no_tape)

    params = jax.eval_shape(partial(transformer.init, config), jax.random.key(0))["blocks"][0]
    x = jax.ShapeDtypeStruct((1, 1, 128), jnp.float32)
    cache = jax.ShapeDtypeStruct((2, 1, context, 2, 64), jnp.float32)
    cost = jax.jit(layer).lower(params, x, cache).compile().cost_analysis()
    assert cost is not None
    expected = forward_flops(config, 1, context)
    # XLA counts the norms, biases, GELU and softmax too, here 1.8%
    assert expected < cost["flops"] < 1.05 * expected


def test_flops_of_a_slice_are_those_of_its_tokens() -> None:
    config = ModelConfig(num_layers=1, d_model=24, num_heads=2, d_ff=50)
    for num_tokens, context in [(1, 0), (7, 0), (7, 3), (130, 64)]:
        one_by_one = [forward_flops(config, 1, context + i) for i in range(num_tokens)]
        assert forward_flops(config, num_tokens, context) == sum(one_by_one)
