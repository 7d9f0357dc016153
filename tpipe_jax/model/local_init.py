"""Fresh parameters of a model whose tokens first attend to their neighbours.

With the usual initialisation attention is uniform at first: in a long sequence a token sees the
mean of a thousand others, and it takes a small model thousands of steps to find its neighbours.
Here each head's keys start equal to its queries ("mimetic initialisation", Trockman and Kolter
2023), and learned positions start as sinusoids (Vaswani et al. 2017, section 3.5). So a token
attends to positions like its own, which are the nearest. Rotary positions do the same: a query and
an equal key score the highest at the same position. The model is what it was, and everything is
learnt on.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.errors import UserError
from tpipe_jax.model.block import Params

POSITION_SCALE = 0.06  # root mean square of positions; that of token embeddings is 0.02
BASE = 100.0  # wavelengths go from 2 pi to BASE times as many tokens
SELF_LOGIT = 29.0  # attention logit of a token with itself, at first
USUAL_SCALE = 0.02  # standard deviation of a block's matrices


def check_local_init(model: ModelConfig) -> None:
    """Raises `UserError` if the blocks are the user's own."""
    if model.has_own_block:
        raise UserError(
            "config.train.init=local is for the blocks of families, but config.model.block="
            f"{model.block}: set config.train.init=normal, which takes parameters as the block "
            "draws them."
        )


def local_positions(model: ModelConfig) -> Array:
    """Returns the embeddings of positions `[T, D]`: sines and cosines of several wavelengths."""
    D = model.d_model
    frequencies = BASE ** (-np.arange(0, D, 2) / D)
    angles = np.arange(model.seq_len)[:, None] * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles)], -1)[:, :D]
    return jnp.asarray(POSITION_SCALE * np.sqrt(2) * waves, jnp.float32)


def local_block(model: ModelConfig, block: Params) -> Params:
    """Returns the parameters of a block, or of several `[P, ...]`, with keys like queries. Keys for
    several heads of queries are like their sum.
    """
    D, K, H = model.d_model, model.width_of_heads, model.num_key_heads
    kernel, num_queries = block["attn_in"]["kernel"], model.num_heads // H
    # `attn_in` has its outputs in this order: the queries for a head of keys, the keys, the values.
    parts = kernel.reshape(*kernel.shape[:-1], H, num_queries + 2, K)
    # A normed input has the norm sqrt(D), so q k / sqrt(K) = sqrt(K) D scale^2 for a token itself.
    scale = (SELF_LOGIT / (D * K**0.5)) ** 0.5
    queries = parts[..., :-2, :] * (scale / USUAL_SCALE)
    keys = queries.sum(-2, keepdims=True)
    parts = jnp.concatenate([queries, keys, parts[..., -1:, :]], -2)
    return block | {"attn_in": block["attn_in"] | {"kernel": parts.reshape(kernel.shape)}}
