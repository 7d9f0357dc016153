"""The frame around the blocks of a model: embedding, positions, final norm and head.

GPT-2 and GPT-3 add learned positions to the embedding of tokens, and their head is that embedding
(Radford et al. 2019). Llama's positions are in its blocks, and its head has a table of its own
(Touvron et al. 2023, arXiv 2302.13971). Only this package and the files of users' blocks have
modules of Flax NNX; everywhere else parameters are plain dictionaries.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.model.block import Params
from tpipe_jax.model.functional import init_block
from tpipe_jax.model.registry import family

# The vocabulary is divided over all stages and 'model'.
_TABLE = PartitionSpec(("pipe", "model"))


def init(config: ModelConfig, key: Array) -> Params:
    """Draws new float32 parameters.

    Returns a dictionary with `embed` (`tokens` [V, D] and, in a family with learned positions,
    `positions` [T, D]), `blocks` (a list), `norm` and, if the head is not the embedding, `head`
    (`table` [V, D]).
    """
    normal = nnx.initializers.normal(0.02)
    # The last key is that of the blocks (`block_keys`).
    key_tokens, key_positions, _ = jax.random.split(key, 3)
    block = jax.jit(partial(init_block, config))  # traced once for all layers
    embed = {"tokens": normal(key_tokens, (config.vocab_size, config.d_model), jnp.float32)}
    if family(config).has_positions:
        embed["positions"] = normal(key_positions, (config.seq_len, config.d_model), jnp.float32)
    params = {
        "embed": embed,
        "blocks": [block(k) for k in block_keys(config, key)],
        "norm": _norm_params(config),
    }
    if not config.has_tied_head:
        key_head = jax.random.fold_in(key_tokens, 1)
        params["head"] = {"table": normal(key_head, embed["tokens"].shape, jnp.float32)}
    return params


def block_keys(config: ModelConfig, key: Array) -> Array:
    """Returns the random keys `[num_layers]` with which `init` draws the parameters of layers."""
    return jax.random.split(jax.random.split(key, 3)[2], config.num_layers)


def frame_specs(config: ModelConfig) -> Params:
    """Returns how the mesh divides all parameters but those of the blocks."""
    embed = {"tokens": _TABLE}
    if family(config).has_positions:
        embed["positions"] = PartitionSpec()
    norm = jax.tree.map(lambda _: PartitionSpec(), jax.eval_shape(lambda: _norm_params(config)))
    return {"embed": embed, "norm": norm} | (
        {} if config.has_tied_head else {"head": {"table": _TABLE}}
    )


def head_table(params: Params) -> Array:
    """Returns the table of the head, `[V, D]`: its own, or the embedding of tokens."""
    return params["head"]["table"] if "head" in params else params["embed"]["tokens"]


def final_norm(config: ModelConfig, params: Params, x_BTD: Array) -> Array:
    """Applies the norm before the head, in float32."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: _norm(config)))
    return nnx.merge(graph, params)(x_BTD)


def num_params(config: ModelConfig) -> int:
    """How many parameters the model has."""
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _norm(config: ModelConfig) -> nnx.Module:
    return family(config).norm(config.d_model, epsilon=config.norm_eps, rngs=nnx.Rngs(0))


def _norm_params(config: ModelConfig) -> Params:
    return nnx.to_pure_dict(nnx.state(_norm(config)))
