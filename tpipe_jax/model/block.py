"""The interface between a transformer block and the pipeline.

A block is cut at its attention: `qkv` comes before it and `finish` after it. The pipeline itself
computes attention, forward and backward, on caches, because attention is where the slices of a
sequence meet. A block may compute anything else, as long as it treats each token on its own.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from tpipe_jax.config.settings import ModelConfig

Params = Any  # nested dictionaries and lists of arrays
Tape = Callable[[str, Array], Array]  # sees a named value, returns the value to go on with


def no_tape(name: str, value: Array) -> Array:
    """The tape for a block whose named values nobody needs: returns the value as it is."""
    return value


class Block(nnx.Module):
    """A layer of the model, from the residual stream to the residual stream.

    A block of your own is made as `block(config, dtype, rngs)`. Its parameters are float32. Its
    matrix products, and all values that its methods take and return, are in `dtype`. It hands named
    values `[B, L, width]` to the tape and goes on with the value that the tape returns. Each value
    has its own name, other than x, q and lse. A value can be saved for the backward pass if
    config.memory.remat knows its name.
    """

    linears: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """For each layer `x @ kernel + bias`, the names of its input and output on the tape; the value
    that is named as the output may have something added to it. The gradients of the weights of
    these layers are summed in float32 and may be deferred. Other parameters are differentiated
    slice by slice, in their own format."""
    norms: ClassVar[Mapping[str, str]] = {}
    """For each norm `x * scale`, or `x * scale + bias`, whose result is the input of one linear
    layer and of nothing else, the name of that layer, which is in `linears`. A step multiplies the
    scale into the layer's kernel, and the methods get a scale of 1 and a bias of 0 (`folding`)."""
    router_logits: ClassVar[str | None] = None
    """The name on the tape of the logits `[B, L, E]` by which a router chooses among E experts, if
    the block has some. The balance loss is computed from them."""
    specs: ClassVar[Params] = None
    """How the axis 'model' divides the parameters, a tree of `PartitionSpec`; None leaves the
    parameters whole. What depends on the config is in `specs_of`."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        raise NotImplementedError

    @classmethod
    def specs_of(cls, config: ModelConfig) -> Params:
        """Returns `specs` for a config."""
        return cls.specs

    def qkv(self, x_BLD: Array, positions_BL: Array, tape: Tape) -> tuple[Array, Array, Array]:
        """Returns queries `[B, L, G H, K]`, and keys and values `[B, L, H, K]`, of tokens at these
        positions. The first axis of the positions is 1 where all sequences have the same. Each head
        of keys serves G neighbouring heads of queries (grouped-query attention, arXiv 2305.13245).
        """
        raise NotImplementedError

    def query(self, x_BLD: Array, positions_BL: Array, tape: Tape) -> Array:
        """Returns the queries alone."""
        return self.qkv(x_BLD, positions_BL, tape)[0]

    def finish(self, x_BLD: Array, attn_BLHK: Array, tape: Tape) -> Array:
        """Returns the block's output `[B, L, D]` from its input and its attention
        `[B, L, G H, K]`.
        """
        raise NotImplementedError


class Family(NamedTuple):
    """An architecture: its blocks, and what the frame around the blocks is (`transformer`)."""

    block_of: Callable[[ModelConfig], type[Block]]
    norm: Callable[..., nnx.Module]
    """Makes the final norm from a width, `epsilon` and `rngs`; its result is float32."""
    has_positions: bool
    """Whether learned positions are added to the embedding of tokens."""


def merge_heads(a_BLHK: Array) -> Array:
    """Reshapes `[B, L, H, K]` to `[B, L, H K]`."""
    B, L, _, _ = a_BLHK.shape
    return a_BLHK.reshape(B, L, -1)


def split_heads(a_BLD: Array, num_heads: int) -> Array:
    """The inverse of `merge_heads`."""
    B, L, _ = a_BLD.shape
    return a_BLD.reshape(B, L, num_heads, -1)
