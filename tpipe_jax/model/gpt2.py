"""GPT-2's block: LayerNorm before each half, biases, GELU by tanh (Radford et al. 2019)."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.model.block import Block, Family, Tape, merge_heads

_NORM = {"scale": PartitionSpec(), "bias": PartitionSpec()}
_COLUMNS = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")}
_ROWS = {"kernel": PartitionSpec("model"), "bias": PartitionSpec()}

# Without a dtype it returns float32, the dtype of its parameters.
_layer_norm = partial(nnx.LayerNorm, use_fast_variance=False)


class GPT2Block(Block):
    """The block of GPT-2.

    The outputs of `attn_in` are ordered by head, then by query, key and value, then by width. So
    'model' can divide them by heads without a transfer. The tape sees `norm_1`, `norm_2`, `attn`,
    `middle`, `out` `[B, L, D]`, `qkv` `[B, L, 3 D]`, `hidden` and `gelu` `[B, L, F]`.
    """

    # middle and out include the residual. The gradient with respect to such a sum is also the
    # gradient with respect to the layer's output.
    linears: ClassVar = {
        "attn_in": ("norm_1", "qkv"),
        "attn_out": ("attn", "middle"),
        "ff_in": ("norm_2", "hidden"),
        "ff_out": ("gelu", "out"),
    }
    norms: ClassVar = {"norm_1": "attn_in", "norm_2": "ff_in"}
    # Divided by attention heads and by feed-forward width (Megatron-LM, Shoeybi et al. 2019).
    specs: ClassVar = {
        "norm_1": _NORM,
        "attn_in": _COLUMNS,
        "attn_out": _ROWS,
        "norm_2": _NORM,
        "ff_in": _COLUMNS,
        "ff_out": _ROWS,
    }

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, F = config.d_model, config.ff_width
        init = nnx.initializers.normal(0.02)
        residual_init = nnx.initializers.normal(0.02 * (2 * config.num_layers) ** -0.5)
        linear = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.num_heads, self.dtype = config.num_heads, dtype
        norm = partial(_layer_norm, D, epsilon=config.norm_eps, rngs=rngs)
        self.norm_1 = norm()
        self.attn_in = linear(D, 3 * D, kernel_init=init)
        self.attn_out = linear(D, D, kernel_init=residual_init)
        self.norm_2 = norm()
        self.ff_in = linear(D, F, kernel_init=init)
        self.ff_out = linear(F, D, kernel_init=residual_init)

    def qkv(self, x_BLD: Array, positions_BL: Array, tape: Tape) -> tuple[Array, Array, Array]:
        normed_BLD = tape("norm_1", self.norm_1(x_BLD).astype(self.dtype))
        qkv_BLE = tape("qkv", self.attn_in(normed_BLD))
        B, L, _ = x_BLD.shape
        qkv_BLHtK = qkv_BLE.reshape(B, L, self.num_heads, 3, -1)
        # A split rather than three indices, since the gradient of a split is one concatenation.
        q, k, v = (part.squeeze(3) for part in lax.split(qkv_BLHtK, (1, 1, 1), axis=3))
        return q, k, v

    def query(self, x_BLD: Array, positions_BL: Array, tape: Tape) -> Array:
        normed_BLD = tape("norm_1", self.norm_1(x_BLD).astype(self.dtype))

        def of_queries(a: Array) -> Array:
            return a.reshape(*a.shape[:-1], self.num_heads, 3, -1)[..., 0, :].astype(self.dtype)

        linear = jax.tree.map(of_queries, nnx.to_pure_dict(nnx.state(self.attn_in)))
        return jnp.einsum("bld,dhk->blhk", normed_BLD, linear["kernel"]) + linear["bias"]

    def finish(self, x_BLD: Array, attn_BLHK: Array, tape: Tape) -> Array:
        attn_BLD = tape("attn", merge_heads(attn_BLHK))
        middle_BLD = tape("middle", x_BLD + self.attn_out(attn_BLD))
        normed_BLD = tape("norm_2", self.norm_2(middle_BLD).astype(self.dtype))
        hidden_BLF = tape("hidden", self.ff_in(normed_BLD))
        activation_BLF = nnx.gelu(hidden_BLF.astype(jnp.float32), approximate=True)
        activation_BLF = tape("gelu", activation_BLF.astype(self.dtype))
        return tape("out", middle_BLD + self.ff_out(activation_BLF))


FAMILY = Family(lambda config: GPT2Block, _layer_norm, has_positions=True)
