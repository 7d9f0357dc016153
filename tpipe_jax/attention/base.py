"""What attention is to a stage: keys and values in a cache, and two functions of a slice."""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from tpipe_jax.devices.inplace import Position, read, write

MASKED = -1e30  # finite, so that the difference of two masked scores is not NaN


class KVCache(NamedTuple):
    """Keys and values of the sequences, `[B, H, T, K]` each, or their gradients. Each head serves
    as many heads of queries as lie side by side, which are G H.
    """

    k: Array
    v: Array


class Attention(NamedTuple):
    """A way to compute attention, forward and backward."""

    forward: Callable[[Array, KVCache, Position, Array | None], tuple[Array, Array]]
    """As `attend`."""
    backward: Callable[
        [Array, KVCache, Position, Array, Array, Array, KVCache, Array | None],
        tuple[Array, KVCache],
    ]
    """As `attend_backward`."""
    key_block: int
    """Keys that are read together: the time of a context grows in such steps."""


def add_to_cache(cache: KVCache, values: KVCache, at: Position) -> KVCache:
    """The sum."""
    B, _, L, _ = values.k.shape
    sums = (read(c, at, B, L) + value for c, value in zip(cache, values, strict=True))
    return KVCache(*(write(c, value, at) for c, value in zip(cache, sums, strict=True)))


class Heads(NamedTuple):
    """Of the attention of a block."""

    num_queries: int
    num_keys: int
    width: int
