"""Llama's block: rotary positions, grouped queries, RMSNorm and SwiGLU, without biases.

Llama 1 to 3 (arXiv 2302.13971, 2407.21783), Mistral (arXiv 2310.06825), Qwen2, which has biases of
queries, keys and values (arXiv 2407.10671), and Qwen3, which has norms of queries and keys
(arXiv 2505.09388). Mixtral (arXiv 2401.04088) and Qwen3-MoE have experts in the place of the
feed-forward layer (`experts`).
"""

import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.model.block import Block, Family, Tape, merge_heads
from tpipe_jax.model.experts import Experts
from tpipe_jax.model.rope import rotation

MOST_GROUPS = 64  # into which the feed-forward width is divided (`ff_groups`)


def ff_groups(config: ModelConfig) -> int:
    """Groups of the outputs of `ff_in`: gates and values of one group lie side by side. So 'model'
    can divide them by groups without a transfer.
    """
    return math.gcd(config.ff_width, MOST_GROUPS)


class LlamaBlock(Block):
    """The block of Llama, Mistral, Qwen2 and Qwen3.

    The outputs of `attn_in` are ordered by head of keys. For each there are its G heads of queries,
    then the keys, then the values. The outputs of `ff_in` are ordered by group (`ff_groups`): for
    each its gates, then its values. So 'model' can divide both without a transfer. The tape sees
    `norm_1`, `norm_2`, `attn`, `middle`, `out`, `qkv` `[B, L, (N + 2 H) K]`, `hidden`
    `[B, L, 2 F]` and `swiglu` `[B, L, F]`.
    """

    linears: ClassVar = {
        "attn_in": ("norm_1", "qkv"),
        "attn_out": ("attn", "middle"),
        "ff_in": ("norm_2", "hidden"),
        "ff_out": ("swiglu", "out"),
    }
    norms: ClassVar = {"norm_1": "attn_in", "norm_2": "ff_in"}

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, K = config.d_model, config.width_of_heads
        N, H = config.num_heads, config.num_key_heads
        norm = partial(_rms_norm, epsilon=config.norm_eps, rngs=rngs)
        self.num_keys, self.width, self.dtype = H, K, dtype
        self.rotation = rotation(config)
        self.norm_1, self.norm_2 = norm(D), norm(D)
        linear, residual = _linears(config, dtype, rngs)
        self.attn_in = linear(D, (N + 2 * H) * K, use_bias=config.qkv_bias)
        self.attn_out = residual(N * K, D)
        self._make_feed_forward(config, rngs)
        self.has_qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = norm(K), norm(K)

    def _make_feed_forward(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        D, F = config.d_model, config.ff_width
        linear, residual = _linears(config, self.dtype, rngs)
        self.num_groups = ff_groups(config)
        self.ff_in, self.ff_out = linear(D, 2 * F), residual(F, D)

    @classmethod
    def specs_of(cls, config: ModelConfig) -> dict:
        """As in GPT-2's block. Norms of queries and keys are the same for all heads."""
        columns, rows = PartitionSpec(None, "model"), PartitionSpec("model")
        norm, biases = {"scale": PartitionSpec()}, {"bias": rows} if config.qkv_bias else {}
        specs = {
            "norm_1": norm,
            "attn_in": {"kernel": columns, **biases},
            "attn_out": {"kernel": rows},
            "norm_2": norm,
            "ff_in": {"kernel": columns},
            "ff_out": {"kernel": rows},
        }
        return specs | ({"q_norm": norm, "k_norm": norm} if config.qk_norm else {})

    def qkv(self, x_BLD: Array, positions_BL: Array, tape: Tape) -> tuple[Array, Array, Array]:
        normed_BLD = tape("norm_1", self.norm_1(x_BLD).astype(self.dtype))
        qkv_BLE = tape("qkv", self.attn_in(normed_BLD))
        B, L, _ = x_BLD.shape
        qkv_BLHgK = qkv_BLE.reshape(B, L, self.num_keys, -1, self.width)
        sizes = qkv_BLHgK.shape[3] - 2, 1, 1
        q, k, v = lax.split(qkv_BLHgK, sizes, axis=3)
        return self._query(q, positions_BL), self._key(k.squeeze(3), positions_BL), v.squeeze(3)

    def query(self, x_BLD: Array, positions_BL: Array, tape: Tape) -> Array:
        normed_BLD = tape("norm_1", self.norm_1(x_BLD).astype(self.dtype))

        def of_queries(a: Array) -> Array:
            parts = a.reshape(*a.shape[:-1], self.num_keys, -1, self.width)
            return parts[..., :-2, :].astype(self.dtype)

        linear = jax.tree.map(of_queries, nnx.to_pure_dict(nnx.state(self.attn_in)))
        q = jnp.einsum("bld,dhgk->blhgk", normed_BLD, linear["kernel"]) + linear.get("bias", 0)
        return self._query(q, positions_BL)

    def finish(self, x_BLD: Array, attn_BLHK: Array, tape: Tape) -> Array:
        attn_BLE = tape("attn", merge_heads(attn_BLHK))
        middle_BLD = tape("middle", x_BLD + self.attn_out(attn_BLE))
        normed_BLD = tape("norm_2", self.norm_2(middle_BLD).astype(self.dtype))
        return tape("out", middle_BLD + self._feed_forward(normed_BLD, tape))

    def _feed_forward(self, normed_BLD: Array, tape: Tape) -> Array:
        hidden_BLF = tape("hidden", self.ff_in(normed_BLD))
        B, L, _ = normed_BLD.shape
        parts = hidden_BLF.astype(jnp.float32).reshape(B, L, self.num_groups, 2, -1)
        gate, value = (part.squeeze(3) for part in lax.split(parts, (1, 1), axis=3))
        swiglu_BLF = (nnx.silu(gate) * value).reshape(B, L, -1)
        swiglu_BLF = tape("swiglu", swiglu_BLF.astype(self.dtype))
        return self.ff_out(swiglu_BLF)

    def _query(self, q_BLHGK: Array, positions_BL: Array) -> Array:
        B, L, _, _, K = q_BLHGK.shape
        q = q_BLHGK.reshape(B, L, -1, K)
        q = self.q_norm(q).astype(self.dtype) if self.has_qk_norm else q
        return self.rotation.turned(q, positions_BL)

    def _key(self, k_BLHK: Array, positions_BL: Array) -> Array:
        k = self.k_norm(k_BLHK).astype(self.dtype) if self.has_qk_norm else k_BLHK
        return self.rotation.turned(k, positions_BL)


class ExpertsBlock(LlamaBlock):
    """The block of Mixtral and Qwen3-MoE. The tape sees `router` `[B, L, E]`, the logits, and no
    `hidden` or `swiglu`, which are computed again in the backward pass.
    """

    linears: ClassVar = {
        "attn_in": ("norm_1", "qkv"),
        "attn_out": ("attn", "middle"),
        "router": ("norm_2", "router"),
    }
    norms: ClassVar = {"norm_1": "attn_in"}  # experts read norm_2, too
    router_logits: ClassVar = "router"

    def _make_feed_forward(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        if not config.num_experts:
            raise ValueError("it needs config.model.num_experts")
        linear, _ = _linears(config, self.dtype, rngs)
        self.router = linear(config.d_model, config.num_experts)
        self.experts = Experts(config, self.dtype, rngs)

    @classmethod
    def specs_of(cls, config: ModelConfig) -> dict:
        """As in Llama's block, with the experts divided. Each device computes all logits."""
        specs = super().specs_of(config)
        kept = {name: spec for name, spec in specs.items() if name not in ("ff_in", "ff_out")}
        return kept | {"router": {"kernel": PartitionSpec()}, "experts": Experts.specs()}

    def _feed_forward(self, normed_BLD: Array, tape: Tape) -> Array:
        return self.experts(normed_BLD, tape("router", self.router(normed_BLD)))


def _linears(config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> tuple[Any, Any]:
    """Returns the makers of linear layers, and of those whose output is added to the residual
    stream.
    """
    linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
    init = nnx.initializers.normal
    residual = init(0.02 * (2 * config.num_layers) ** -0.5)
    return partial(linear, kernel_init=init(0.02)), partial(linear, kernel_init=residual)


def _block_of(config: ModelConfig) -> type[Block]:
    return ExpertsBlock if config.num_experts else LlamaBlock


# Without a dtype it returns float32, the dtype of its parameters.
_rms_norm = nnx.RMSNorm

FAMILY = Family(_block_of, _rms_norm, has_positions=False)
