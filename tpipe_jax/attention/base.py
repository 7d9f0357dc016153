"""The interface of attention: a cache of keys and values, and two functions of a slice."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jax import Array
from jax.sharding import PartitionSpec

from tpipe_jax.devices.inplace import Position, read, write

MASKED = -1e30  # finite, so that the difference of two masked scores is not NaN


class Heads(NamedTuple):
    """The heads of a block's attention."""

    num_queries: int
    num_keys: int
    width: int


class KVCache(NamedTuple):
    """Keys and values of the sequences, or their gradients, as a `Layout` orders them. Each head of
    keys serves G neighbouring heads of queries, so there are G H heads of queries.
    """

    k: Array
    v: Array


@dataclass(frozen=True)
class Layout:
    """The order of a cache's axes: `[B, H, T, K]` with heads first, else `[B, T, H K]`."""

    has_heads_first: bool

    def shape(self, num_rows: int, seq_len: int, heads: Heads) -> tuple[int, ...]:
        """The shape of the keys of `num_rows` sequences."""
        if self.has_heads_first:
            return num_rows, heads.num_keys, seq_len, heads.width
        return num_rows, seq_len, heads.num_keys * heads.width

    @property
    def spec(self) -> PartitionSpec:
        """How the axis 'model' divides a cache: by heads."""
        return PartitionSpec(None, "model") if self.has_heads_first else BY_HEADS

    def num_heads(self, cache: KVCache, width: int) -> int:
        """The number H of heads in a cache."""
        return cache.k.shape[1] if self.has_heads_first else cache.k.shape[-1] // width

    def arranged(self, a_BLHK: Array) -> Array:
        """Returns keys of a slice in this order."""
        B, L, _, _ = a_BLHK.shape
        return a_BLHK.transpose(0, 2, 1, 3) if self.has_heads_first else a_BLHK.reshape(B, L, -1)

    def read(self, keys: Array, at: Position, num_rows: int, num_tokens: int, width: int) -> Array:
        """Returns keys of a slice, `[B, L, H, K]`."""
        found = read(keys, at, num_rows, num_tokens)
        if self.has_heads_first:
            return found.transpose(0, 2, 1, 3)
        return found.reshape(num_rows, num_tokens, -1, width)

    def heads_first(self, keys: Array, width: int) -> Array:
        """Returns keys of this order as `[B, H, T, K]`."""
        if self.has_heads_first:
            return keys
        B, T, _ = keys.shape
        return keys.reshape(B, T, -1, width).transpose(0, 2, 1, 3)

    def write(self, cache: KVCache, k_BLHK: Array, v_BLHK: Array, at: Position) -> KVCache:
        """Returns the cache with the keys and values of a slice in their place."""
        new = map(self.arranged, (k_BLHK, v_BLHK))
        return KVCache(*(write(c, value, at) for c, value in zip(cache, new, strict=True)))


BY_HEADS = PartitionSpec(None, None, "model")  # of [B, L, N, K], [B, L, N] and [B, T, H K]
HEADS_FIRST, TOKENS_FIRST = Layout(True), Layout(False)


class Slice(NamedTuple):
    """A token slice whose keys and values are in the cache already."""

    q_BLNK: Array
    """The queries of the slice, with N = G H heads."""
    cache: KVCache
    """Keys and values of whole sequences. The slice sees only its context and itself."""
    at: Position
    """Where the slice lies in the cache, a run-time value."""
    starts_BL1: Array | None = None
    """Where each token's document begins in its sequence, int32; a token sees nothing before that
    start. None where each sequence is one document."""

    @property
    def num_tokens(self) -> int:
        return self.q_BLNK.shape[1]


class Attention(NamedTuple):
    """A way to compute attention, forward and backward."""

    forward: Callable[[Slice], tuple[Array, Array]]
    """The output `[B, L, N, K]`, in the dtype of the queries, and the log-sum-exp of each row of
    scores, `[B, L, N]` float32."""
    backward: Callable[[Slice, Array, Array, Array, KVCache], tuple[Array, KVCache, KVCache]]
    """`(slice, output, log-sum-exp, gradient with respect to the output, d_cache)` to the gradients
    with respect to the queries, to the slice's own keys and values `[B, L, H, K]`, and the new
    d_cache.

    Slices go backward in descending order, and each adds its gradients for the keys and values of
    its context to `d_cache`, float32 sums. So the sums for a slice are complete when it goes
    backward itself: its own gradients are these sums and what comes from itself. Its part of
    `d_cache` is not used after that. If `d_cache` has fewer rows than the cache, its first rows are
    used."""
    key_block: int
    """Keys that are read together: time grows with the context in steps of so many tokens."""
    group: int
    """Keys that one turn of the loop over a context reads, at most; whole contexts have no loop."""
    layout: Layout
    """The order of the axes of the caches."""
    window: int | None = None
    """Tokens that a token sees, itself included, where the attention itself hides the others; where
    it does not, `Slice.starts_BL1` says what is seen."""


def add_to_cache(cache: KVCache, values: KVCache, at: Position, num_tokens: int) -> KVCache:
    """Returns the cache with these values, of its own order, added to it from a position on."""
    num_rows = len(values.k)
    sums = (read(c, at, num_rows, num_tokens) + d for c, d in zip(cache, values, strict=True))
    return KVCache(*(write(c, total, at) for c, total in zip(cache, sums, strict=True)))
