"""The GPT of GPT-2 and GPT-3 in Flax NNX, as parameters and pure functions of them.

Pre-LayerNorm blocks with biases, learned positions, tanh-approximated GELU, a head tied to the
token embedding, and GPT-2's initialisation (Radford et al. 2019). This is the only module that
imports flax; parameters are plain dictionaries everywhere else.

A block is cut at its attention, `qkv` before it and `finish` after it, because attention is where
the slices of a sequence meet: the pipeline runs it on caches and walks back through it by hand.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tpipe_jax.attention import KVCache, attend, attend_backward
from tpipe_jax.config import ModelConfig
from tpipe_jax.inplace import Position

Params = Any  # nested dictionaries and lists of arrays
Tape = Callable[[str, Array], Array]  # sees each named value, returns the value to go on with


def no_tape(name: str, value: Array) -> Array:
    """The tape of a block whose values nobody needs."""
    return value


# Without a dtype it returns float32, that of its parameters.
_layer_norm = partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False)


# The linear layers of a block: the named values that each takes and gives. To middle and out the
# residual is added, which leaves the gradient with respect to the layer's output the same.
LINEARS = {
    "attn_in": ("norm_1", "qkv"),
    "attn_out": ("attn", "middle"),
    "ff_in": ("norm_2", "hidden"),
    "ff_out": ("gelu", "out"),
}


class Block(nnx.Module):
    """One transformer block.

    The outputs of `attn_in` are ordered head, then query, key and value, then width: so 'model' can
    divide them by heads without a transfer.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, F = config.d_model, config.ff_width
        init = nnx.initializers.normal(0.02)
        residual_init = nnx.initializers.normal(0.02 * (2 * config.num_layers) ** -0.5)
        linear = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.num_heads, self.dtype = config.num_heads, dtype
        self.norm_1 = _layer_norm(D, rngs=rngs)
        self.attn_in = linear(D, 3 * D, kernel_init=init)
        self.attn_out = linear(D, D, kernel_init=residual_init)
        self.norm_2 = _layer_norm(D, rngs=rngs)
        self.ff_in = linear(D, F, kernel_init=init)
        self.ff_out = linear(F, D, kernel_init=residual_init)

    def qkv(self, x_BLD: Array, tape: Tape) -> Array:
        normed_BLD = tape("norm_1", self.norm_1(x_BLD).astype(self.dtype))
        qkv_BLE = tape("qkv", self.attn_in(normed_BLD))
        B, L, _ = x_BLD.shape
        return qkv_BLE.reshape(B, L, self.num_heads, 3, -1).transpose(3, 0, 2, 1, 4)

    def query(self, x_BLD: Array, tape: Tape) -> Array:
        normed_BLD = tape("norm_1", self.norm_1(x_BLD).astype(self.dtype))

        def of_queries(a: Array) -> Array:
            return a.reshape(*a.shape[:-1], self.num_heads, 3, -1)[..., 0, :].astype(self.dtype)

        linear = jax.tree.map(of_queries, nnx.to_pure_dict(nnx.state(self.attn_in)))
        product_BHLK = jnp.einsum("bld,dhk->bhlk", normed_BLD, linear["kernel"])
        return product_BHLK + linear["bias"][:, None]

    def finish(self, x_BLD: Array, attn_BHLK: Array, tape: Tape) -> Array:
        attn_BLD = tape("attn", merge_heads(attn_BHLK))
        middle_BLD = tape("middle", x_BLD + self.attn_out(attn_BLD))
        normed_BLD = tape("norm_2", self.norm_2(middle_BLD).astype(self.dtype))
        hidden_BLF = tape("hidden", self.ff_in(normed_BLD))
        activation_BLF = tape("gelu", nnx.gelu(hidden_BLF, approximate=True))
        return tape("out", middle_BLD + self.ff_out(activation_BLF))


def merge_heads(a_BHLK: Array) -> Array:
    """`[B, H, L, K]` to `[B, L, H K]`."""
    B, _, L, _ = a_BHLK.shape
    return a_BHLK.transpose(0, 2, 1, 3).reshape(B, L, -1)


def split_heads(a_BLD: Array, num_heads: int) -> Array:
    """The inverse of `merge_heads`."""
    B, L, _ = a_BLD.shape
    return a_BLD.reshape(B, L, num_heads, -1).transpose(0, 2, 1, 3)


class BlockFunctions(NamedTuple):
    """A block as pure functions of its parameters.

    The tape sees the values `norm_1`, `norm_2`, `attn`, `middle`, `out` `[B, L, D]`, `qkv`
    `[B, L, 3 D]`, `hidden` and `gelu` `[B, L, F]`.
    """

    qkv: Callable[[Params, Array, Tape], Array]
    """`(params, x [B, L, D], tape)` to queries, keys and values `[3, B, H, L, K]`."""
    query: Callable[[Params, Array, Tape], Array]
    """The queries alone, `[B, H, L, K]`."""
    finish: Callable[[Params, Array, Array, Tape], Array]
    """`(params, x [B, L, D], attention [B, H, L, K], tape)` to the block's output `[B, L, D]`."""


def block_functions(config: ModelConfig, dtype: jnp.dtype) -> BlockFunctions:
    """The pure functions of one block, computing in `dtype`."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Block(config, dtype, nnx.Rngs(0))))
    return BlockFunctions(
        qkv=lambda params, x, tape: nnx.merge(graph, params).qkv(x, tape),
        query=lambda params, x, tape: nnx.merge(graph, params).query(x, tape),
        finish=lambda params, x, attn, tape: nnx.merge(graph, params).finish(x, attn, tape),
    )


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


def init_block(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 parameters of one layer."""
    return nnx.to_pure_dict(nnx.state(Block(config, jnp.float32, nnx.Rngs(key))))


def final_norm(params: Params, x_BTD: Array) -> Array:
    """The LayerNorm before the head, in float32."""
    D = x_BTD.shape[-1]
    graph, _ = nnx.split(nnx.eval_shape(lambda: _layer_norm(D, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, params)(x_BTD)


def num_params(config: ModelConfig) -> int:
    """How many parameters the model has."""
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@jax.custom_vjp
def self_attention(qkv_tBHTK: Array) -> Array:
    """Attention of whole sequences `[3, B, H, T, K]` as a single slice, differentiable."""
    q, k, v = qkv_tBHTK
    return attend(q, KVCache(k, v), Position(0, 0))[0]


def _self_attention_forward(qkv_tBHTK: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    q, k, v = qkv_tBHTK
    out, lse = attend(q, KVCache(k, v), Position(0, 0))
    return out, (qkv_tBHTK, out, lse)


def _self_attention_backward(residuals: tuple[Array, Array, Array], d_out: Array) -> tuple[Array]:
    (q, k, v), out, lse = residuals
    zeros = KVCache(jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32))
    d_q, d_cache = attend_backward(q, KVCache(k, v), Position(0, 0), out, lse, d_out, zeros)
    return (jnp.stack([d_q, *(d.astype(d_q.dtype) for d in d_cache)]),)


self_attention.defvjp(_self_attention_forward, _self_attention_backward)


def logits(config: ModelConfig, params: Params, tokens_BT: Array) -> Array:
    """Logits `[B, T, V]` of the whole model on one device, without a pipeline, in float32.

    What everything else is tested against.
    """
    block = block_functions(config, jnp.float32)
    x_BTD = (
        params["embed"]["tokens"][tokens_BT] + params["embed"]["positions"][: tokens_BT.shape[1]]
    )
    for block_params in params["blocks"]:
        attn_BHTK = self_attention(block.qkv(block_params, x_BTD, no_tape))
        x_BTD = block.finish(block_params, x_BTD, attn_BHTK, no_tape)
    return jnp.einsum("btd,vd->btv", final_norm(params["norm"], x_BTD), params["embed"]["tokens"])
