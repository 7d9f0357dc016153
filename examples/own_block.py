"""The pipeline around a block of your own: rotary positions, grouped queries, RMSNorm and SwiGLU.

python examples/own_block.py
tpipe train --config.model.block=examples/own_block.py:LlamaBlock --config.train.init=normal
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpipe_jax import Block, Config, make_train_step
from tpipe_jax.config import MeshConfig, ModelConfig, PlanConfig, TrainConfig
from tpipe_jax.model.block import merge_heads, split_heads


class LlamaBlock(Block):
    """As in Llama 2 (arXiv 2307.09288), with two heads of queries for each head of keys."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        D, F, K = config.d_model, config.ff_width, config.d_model // config.num_heads
        self.num_heads, self.num_keys, self.dtype = config.num_heads, config.num_heads // 2, dtype
        self.norm_1, self.norm_2 = nnx.RMSNorm(D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.q, self.k, self.v = linear(D, D), linear(D, D // 2), linear(D, D // 2)
        self.o, self.down = linear(D, D), linear(F, D)
        self.gate, self.up = linear(D, F), linear(D, F)
        self.frequencies = tuple(10000.0 ** (-np.arange(0, K, 2) / K))

    def rotated(self, a_BLHK: jax.Array, positions_BL: jax.Array) -> jax.Array:
        angles = positions_BL[..., None, None] * jnp.array(self.frequencies)
        a, b = jnp.split(a_BLHK.astype(jnp.float32), 2, -1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(self.dtype)

    def qkv(self, x_BLD, positions_BL, tape):
        normed = tape("norm_1", self.norm_1(x_BLD).astype(self.dtype))
        k, v = (split_heads(linear(normed), self.num_keys) for linear in (self.k, self.v))
        q = split_heads(self.q(normed), self.num_heads)
        return self.rotated(q, positions_BL), self.rotated(k, positions_BL), v

    def finish(self, x_BLD, attn_BLHK, tape):
        middle = tape("middle", x_BLD + self.o(merge_heads(attn_BLHK)))
        normed = tape("norm_2", self.norm_2(middle).astype(self.dtype))
        return middle + self.down(tape("hidden", nnx.silu(self.gate(normed)) * self.up(normed)))


if __name__ == "__main__":
    block = f"{__file__}:LlamaBlock"
    model = ModelConfig(num_layers=4, d_model=64, num_heads=4, seq_len=128, block=block)
    slices = PlanConfig("uniform:4", "uniform:2")
    step = make_train_step(Config(model, MeshConfig(pipe=2), slices, TrainConfig(batch_size=4)))
    state, rows = step.init(), np.tile(np.arange(129), (4, 1))
    for _ in range(100):
        state, metrics = step(state, rows)
    print(f"loss {metrics['loss']:.3f} nats per token after 100 steps")
