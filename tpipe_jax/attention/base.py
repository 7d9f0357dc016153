"""What attention is to a stage: keys and values in a cache, and two functions of a slice."""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from tpipe_jax.devices.inplace import Position, read, write

MASKED = -1e30  # finite, so that the difference of two masked scores is not NaN


class Heads(NamedTuple):
    """The heads of a block's attention."""

    num_queries: int
    num_keys: int
    width: int


class KVCache(NamedTuple):
    """Keys and values of the sequences, `[B, H, T, K]` each, or their gradients. Each head of keys
    serves as many heads of queries as lie side by side, so that there are G H of these.
    """

    k: Array
    v: Array


class Slice(NamedTuple):
    """A token slice whose keys and values are in the cache already."""

    q_BNLK: Array
    """Its queries, of G H heads."""
    cache: KVCache
    """Keys and values of whole sequences, of which the slice sees its context and itself."""
    at: Position
    """Where the slice lies in the cache, a run-time value."""
    starts_BL1: Array | None = None
    """Where each token's document begins in its sequence, int32; a token sees nothing before that.
    None where a sequence is one document."""

    @property
    def num_tokens(self) -> int:
        return self.q_BNLK.shape[2]


class Attention(NamedTuple):
    """A way to compute attention, forward and backward."""

    forward: Callable[[Slice], tuple[Array, Array]]
    """The output `[B, G H, L, K]`, in the dtype of the queries, and the log-sum-exp of each row of
    scores, `[B, G H, L, 1]` float32."""
    backward: Callable[[Slice, Array, Array, Array, KVCache], tuple[Array, KVCache]]
    """`(slice, output, log-sum-exp, gradient with respect to the output, d_cache)` to the gradient
    with respect to the queries, and the new d_cache.

    Adds the share of the slice to `d_cache`, float32, for its own and for all earlier keys and
    values; in its first rows, if it has fewer than the cache. The sums of a slice are complete once
    all later slices and the slice itself have been here."""
    key_block: int
    """Keys that are read together: the time of a context grows in such steps."""


def add_to_cache(cache: KVCache, values: KVCache, at: Position) -> KVCache:
    """The cache with these values added from a position on."""
    B, _, L, _ = values.k.shape
    sums = (read(c, at, B, L) + value for c, value in zip(cache, values, strict=True))
    return KVCache(*(write(c, value, at) for c, value in zip(cache, sums, strict=True)))
