"""The interface of attention: a cache of keys and values, and two functions of a slice."""

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
    serves G neighbouring heads of queries, so there are G H heads of queries.
    """

    k: Array
    v: Array


class Slice(NamedTuple):
    """A token slice whose keys and values are in the cache already."""

    q_BNLK: Array
    """The queries of the slice, with G H heads."""
    cache: KVCache
    """Keys and values of whole sequences. The slice sees only its context and itself."""
    at: Position
    """Where the slice lies in the cache, a run-time value."""
    starts_BL1: Array | None = None
    """Where each token's document begins in its sequence, int32; a token sees nothing before that
    start. None where each sequence is one document."""

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

    Adds the gradients that come from this slice to `d_cache`, float32, for the keys and values of
    the slice and of its context. If `d_cache` has fewer rows than the cache, its first rows are
    used. The sums for a slice are complete once the slice and all later ones have gone backward."""
    key_block: int
    """Keys that are read together: time grows with the context in steps of so many tokens."""


def add_to_cache(cache: KVCache, values: KVCache, at: Position) -> KVCache:
    """Returns the cache with these values added to it, from a position on."""
    B, _, L, _ = values.k.shape
    sums = (read(c, at, B, L) + value for c, value in zip(cache, values, strict=True))
    return KVCache(*(write(c, value, at) for c, value in zip(cache, sums, strict=True)))
