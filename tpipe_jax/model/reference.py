"""The whole model on one device, without a pipeline. Tests compare all other code with it."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from tpipe_jax.attention.base import HEADS_FIRST, KVCache, Slice
from tpipe_jax.attention.blockwise import attend, attend_backward
from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.devices.inplace import Position
from tpipe_jax.model.block import Params, no_tape
from tpipe_jax.model.functional import block_functions
from tpipe_jax.model.transformer import final_norm, head_table


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def self_attention(q: Array, k: Array, v: Array, window: int | None = None) -> Array:
    """Computes the attention of whole sequences as a single slice, from queries `[B, T, G H, K]`,
    and keys and values `[B, T, H, K]`. It is differentiable.
    """
    return attend(_whole(q, k, v, window))[0]


def _self_attention_forward(
    q: Array, k: Array, v: Array, window: int | None
) -> tuple[Array, tuple[Array, ...]]:
    out, lse = attend(_whole(q, k, v, window))
    return out, (q, k, v, out, lse)


def _self_attention_backward(
    window: int | None, residuals: tuple[Array, ...], d_out: Array
) -> tuple[Array, Array, Array]:
    q, k, v, out, lse = residuals
    own = _whole(q, k, v, window)
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.float32), own.cache)
    d_q, (d_k, d_v), _ = attend_backward(own, out, lse, d_out, zeros)
    return d_q, d_k, d_v


def _whole(q: Array, k: Array, v: Array, window: int | None) -> Slice:
    B, T, _, _ = q.shape
    cache, starts_BT1 = KVCache(HEADS_FIRST.arranged(k), HEADS_FIRST.arranged(v)), None
    if window is not None:
        starts_BT1 = jnp.tile(jnp.maximum(jnp.arange(T) - window + 1, 0)[:, None], (B, 1, 1))
    return Slice(q, cache, Position(0, 0), starts_BT1)


self_attention.defvjp(_self_attention_forward, _self_attention_backward)


def logits(config: ModelConfig, params: Params, tokens_BT: Array) -> Array:
    """Computes the logits `[B, T, V]` of the whole model on one device, without a pipeline, in
    float32.
    """
    block = block_functions(config, jnp.dtype(jnp.float32))
    positions_1T = jnp.arange(tokens_BT.shape[1])[None]
    x_BTD = params["embed"]["tokens"][tokens_BT]
    if "positions" in params["embed"]:
        x_BTD += params["embed"]["positions"][positions_1T]
    for block_params in params["blocks"]:
        q, k, v = block.qkv(block_params, x_BTD, positions_1T, no_tape)
        attn_BTHK = self_attention(q, k, v, config.window)
        x_BTD = block.finish(block_params, x_BTD, attn_BTHK, no_tape)
    normed_BTD = final_norm(config, params["norm"], x_BTD)
    return jnp.einsum("btd,vd->btv", normed_BTD, head_table(params))
