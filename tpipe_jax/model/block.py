"""What a transformer block is to the pipeline.

A block is cut at its attention, `qkv` before it and `finish` after it, because attention is where
the slices of a sequence meet: the pipeline runs it on caches and walks back through it by hand.
What else a block computes is its own business, as long as each token stands for itself.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from tpipe_jax.config.settings import ModelConfig

Params = Any  # nested dictionaries and lists of arrays
Tape = Callable[[str, Array], Array]  # sees each named value, returns the value to go on with


def no_tape(name: str, value: Array) -> Array:
    """The tape of a block whose values nobody needs."""
    return value


class Block(nnx.Module):
    """A layer of the model, from the residual stream to the residual stream.

    A block of your own is made as `block(config, dtype, rngs)`, with float32 parameters and matrix
    products in `dtype`, as are all values that the methods take and give. It hands values
    `[B, L, width]` that the backward pass may save to the tape, each under a name of its own of
    those that config.memory.remat knows, without q, and goes on with what the tape returns.
    """

    linears: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Layers `x @ kernel + bias` whose weights' gradients are summed in float32, and may be
    deferred: the names of the values that each takes and gives, to which something may be added.
    Other parameters are differentiated slice by slice, in their own format."""
    specs: ClassVar[Params] = None
    """How 'model' divides the parameters, a tree of `PartitionSpec`; None leaves them whole."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        raise NotImplementedError

    def qkv(self, x_BLD: Array, positions_BL: Array, tape: Tape) -> tuple[Array, Array, Array]:
        """Queries `[B, G H, L, K]`, keys and values `[B, H, L, K]` of tokens at these positions,
        whose first axis is 1 where all sequences have the same. Each key serves the G queries that
        lie side by side (grouped-query attention, arXiv 2305.13245).
        """
        raise NotImplementedError

    def query(self, x_BLD: Array, positions_BL: Array, tape: Tape) -> Array:
        """The queries alone."""
        return self.qkv(x_BLD, positions_BL, tape)[0]

    def finish(self, x_BLD: Array, attn_BHLK: Array, tape: Tape) -> Array:
        """The block's output `[B, L, D]` from its input and its attention `[B, G H, L, K]`."""
        raise NotImplementedError


def merge_heads(a_BHLK: Array) -> Array:
    """`[B, H, L, K]` to `[B, L, H K]`."""
    B, _, L, _ = a_BHLK.shape
    return a_BHLK.transpose(0, 2, 1, 3).reshape(B, L, -1)


def split_heads(a_BLD: Array, num_heads: int) -> Array:
    """The inverse of `merge_heads`."""
    B, L, _ = a_BLD.shape
    return a_BLD.reshape(B, L, num_heads, -1).transpose(0, 2, 1, 3)
