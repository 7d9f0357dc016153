"""The GPT of GPT-2 and GPT-3 (Radford et al. 2019), as parameters and pure functions of them.

The model has learned positions, blocks (`functional`), a LayerNorm and a head tied to the token
embedding. Only this package and the files of users' blocks have modules of Flax NNX; everywhere
else parameters are plain dictionaries.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.model.block import Params
from tpipe_jax.model.functional import init_block
from tpipe_jax.model.gpt2 import layer_norm


def init(config: ModelConfig, key: Array) -> Params:
    """Draws new float32 parameters.

    Returns a dictionary with `embed` (`tokens` [V, D], `positions` [T, D]), `blocks` (a list) and
    `norm`.
    """
    normal = nnx.initializers.normal(0.02)
    key_tokens, key_positions, _ = jax.random.split(key, 3)
    block = jax.jit(partial(init_block, config))  # traced once for all layers
    return {
        "embed": {
            "tokens": normal(key_tokens, (config.vocab_size, config.d_model), jnp.float32),
            "positions": normal(key_positions, (config.seq_len, config.d_model), jnp.float32),
        },
        "blocks": [block(k) for k in block_keys(config, key)],
        "norm": {"scale": jnp.ones(config.d_model), "bias": jnp.zeros(config.d_model)},
    }


def block_keys(config: ModelConfig, key: Array) -> Array:
    """Returns the random keys `[num_layers]` with which `init` draws the parameters of layers."""
    return jax.random.split(jax.random.split(key, 3)[2], config.num_layers)


def final_norm(params: Params, x_BTD: Array) -> Array:
    """Applies the LayerNorm before the head, in float32."""
    D = x_BTD.shape[-1]
    graph, _ = nnx.split(nnx.eval_shape(lambda: layer_norm(D, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, params)(x_BTD)


def num_params(config: ModelConfig) -> int:
    """How many parameters the model has."""
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
