"""Slices to attend with: drawn, run by an attention, and by the float64 reference."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from support import reference
from tpipe_jax.attention.base import Attention, KVCache, Slice
from tpipe_jax.devices.inplace import Position

B, K = 2, 16  # of a slice
ROWS, T = 4, 640  # of the cache

# Float32 rounds to 6e-8. Scores of a few units carry a few times that into each weight, and sums
# over up to 640 tokens add little: 1e-6 is seen.
TOLERANCE = 5e-6


class DrawnSlice(NamedTuple):
    """A slice, its cache and what comes back to it; all but `at` are arrays of `[B, H, L, K]` or
    `[ROWS, H, T, K]`.
    """

    at: Position
    q: np.ndarray
    cache: KVCache
    d_out: np.ndarray
    d_cache: KVCache

    def own(self, a: np.ndarray) -> np.ndarray:
        """What the slice may read of a cache, and of its gradient what it may change."""
        row, token, *_ = self.at
        return a[row : row + B, :, : token + self.q.shape[2]]


class Result(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    d_q: np.ndarray
    d_cache: KVCache


def draw(
    at: Position, L: int, T: int = T, scale: float = 1.0, seed: int = 0, num_heads: int = 2
) -> DrawnSlice:
    """Normal values; queries are scaled."""
    random, H = np.random.default_rng(seed), num_heads
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    cache, d_cache = (KVCache(*normal(2, ROWS, H, T, K)) for _ in range(2))
    return DrawnSlice(at, scale * normal(B, H, L, K), cache, normal(B, H, L, K), d_cache)


@cache
def compiled(
    attention: Attention, L: int, T: int, num_heads: int, dtype: Any
) -> tuple[Compiled, Compiled]:
    """Both functions ahead of time, so that a position can only be a run-time value."""
    array, H = jax.ShapeDtypeStruct, num_heads
    q, lse = array((B, H, L, K), dtype), array((B, H, L, 1), jnp.float32)
    kv, d_kv = (array((ROWS, H, T, K), d) for d in (dtype, jnp.float32))
    at = Position(array((), jnp.int32), array((), jnp.int32))
    own = Slice(q, KVCache(kv, kv), at)
    forward = jax.jit(attention.forward).lower(own)
    backward = jax.jit(attention.backward).lower(own, q, lse, q, KVCache(d_kv, d_kv))
    return forward.compile(), backward.compile()


def run(s: DrawnSlice, attention: Attention, dtype: Any = jnp.float32) -> Result:
    """What the attention makes of the slice."""
    _, H, L, _ = s.q.shape
    forward, backward = compiled(attention, L, s.cache.k.shape[2], H, jnp.dtype(dtype))
    cast = partial(jax.tree.map, lambda a: jnp.asarray(a, dtype))
    at = Position(jnp.int32(s.at.row), jnp.int32(s.at.token))
    own = Slice(cast(s.q), cast(s.cache), at)
    out, lse = forward(own)
    d_q, d_cache = backward(own, out, lse, cast(s.d_out), s.d_cache)
    return jax.tree.map(np.asarray, Result(out, lse, d_q, d_cache))


def expect(s: DrawnSlice) -> Result:
    """The float64 reference, with gradients added to the part of `d_cache` that the slice sees."""
    k, v = map(s.own, s.cache)
    out, lse = reference.attention(s.q, k, v)
    d_q, *d_kv = reference.attention_gradients(s.q, k, v, s.d_out)
    d_cache = KVCache(*(np.float64(d) for d in s.d_cache))
    for total, d in zip(d_cache, d_kv, strict=True):
        s.own(total)[...] += d
    return Result(out, lse, d_q, d_cache)


def rounded(s: DrawnSlice, dtype: Any) -> DrawnSlice:
    """The slice with values that the dtype has, and no gradients of keys and values yet."""
    q, cache, d_out = jax.tree.map(
        lambda a: np.asarray(jnp.asarray(a, dtype), np.float32), (s.q, s.cache, s.d_out)
    )
    return DrawnSlice(s.at, q, cache, d_out, jax.tree.map(np.zeros_like, s.d_cache))
