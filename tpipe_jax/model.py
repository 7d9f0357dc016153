"""The GPT of GPT-2 and GPT-3 (Radford et al. 2019), as parameters and pure functions of them.

Learned positions, blocks (`layer`), a LayerNorm and a head tied to the token embedding. Modules of
Flax NNX are in here and in the files of the blocks; parameters are plain dictionaries everywhere
else.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tpipe_jax.attention import KVCache, attend, attend_backward
from tpipe_jax.block import Params, no_tape
from tpipe_jax.config import ModelConfig
from tpipe_jax.gpt2_block import layer_norm
from tpipe_jax.inplace import Position
from tpipe_jax.layer import block_functions, init_block


def init(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 parameters.

    A dictionary of `embed` (`tokens` [V, D], `positions` [T, D]), `blocks` (a list) and `norm`.
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
    """What the parameters of each layer are drawn with by `init`, `[num_layers]`."""
    return jax.random.split(jax.random.split(key, 3)[2], config.num_layers)


def final_norm(params: Params, x_BTD: Array) -> Array:
    """The LayerNorm before the head, in float32."""
    D = x_BTD.shape[-1]
    graph, _ = nnx.split(nnx.eval_shape(lambda: layer_norm(D, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, params)(x_BTD)


def num_params(config: ModelConfig) -> int:
    """How many parameters the model has."""
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@jax.custom_vjp
def self_attention(q: Array, k: Array, v: Array) -> Array:
    """Attention of whole sequences, queries `[B, G H, T, K]`, keys and values `[B, H, T, K]`, as a
    single slice, differentiable.
    """
    return attend(q, KVCache(k, v), Position(0, 0))[0]


def _self_attention_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    out, lse = attend(q, KVCache(k, v), Position(0, 0))
    return out, (q, k, v, out, lse)


def _self_attention_backward(
    residuals: tuple[Array, ...], d_out: Array
) -> tuple[Array, Array, Array]:
    q, k, v, out, lse = residuals
    zeros = KVCache(jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32))
    d_q, d_cache = attend_backward(q, KVCache(k, v), Position(0, 0), out, lse, d_out, zeros)
    return d_q, d_cache.k.astype(k.dtype), d_cache.v.astype(v.dtype)


self_attention.defvjp(_self_attention_forward, _self_attention_backward)


def logits(config: ModelConfig, params: Params, tokens_BT: Array) -> Array:
    """Logits `[B, T, V]` of the whole model on one device, without a pipeline, in float32.

    What everything else is tested against.
    """
    block = block_functions(config, jnp.dtype(jnp.float32))
    positions_1T = jnp.arange(tokens_BT.shape[1])[None]
    x_BTD = params["embed"]["tokens"][tokens_BT] + params["embed"]["positions"][positions_1T]
    for block_params in params["blocks"]:
        attn_BHTK = self_attention(*block.qkv(block_params, x_BTD, positions_1T, no_tape))
        x_BTD = block.finish(block_params, x_BTD, attn_BHTK, no_tape)
    return jnp.einsum("btd,vd->btv", final_norm(params["norm"], x_BTD), params["embed"]["tokens"])
