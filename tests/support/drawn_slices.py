"""Slices to attend with: drawn, run by an attention, and by the float64 reference."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.stages import Compiled

from support import reference
from tpipe_jax.attention.base import Attention, KVCache, Layout, Slice
from tpipe_jax.devices.inplace import Position

B, K = 2, 16  # of a slice
ROWS, T = 4, 640  # of the cache

# Float32 rounds to 6e-8. Scores of a few units carry a few times that into each weight, and sums
# over up to 640 tokens add little: 1e-6 is seen.
TOLERANCE = 5e-6


class DrawnSlice(NamedTuple):
    """A slice, its cache and what comes back to it. All but `at` are arrays with heads first:
    `[B, N, L, K]` of the slice, and `[ROWS, H, T, K]` of the cache. `d_cache` may have fewer rows.
    """

    at: Position
    q: np.ndarray
    cache: KVCache
    d_out: np.ndarray
    d_cache: KVCache

    def seen(self, a: np.ndarray) -> np.ndarray:
        """What the slice may read of a cache: its context and itself."""
        _, token, *_ = self.at
        return self._rows(a)[:, :, : token + self.q.shape[2]]

    def context(self, a: np.ndarray) -> np.ndarray:
        """What the slice changes of the gradients of a cache."""
        return self.seen(a)[:, :, : self.at.token]

    def itself(self, a: np.ndarray) -> np.ndarray:
        """The slice's own part of a cache."""
        return self.seen(a)[:, :, self.at.token :]

    def _rows(self, a: np.ndarray) -> np.ndarray:
        """Gradients in fewer rows than the cache has are in the first ones."""
        row = self.at.row if len(a) == len(self.cache.k) else 0
        return a[row : row + len(self.q)]


class Result(NamedTuple):
    """All with heads first. `d_kv` are the gradients of the slice's own keys and values."""

    out: np.ndarray
    lse: np.ndarray
    d_q: np.ndarray
    d_kv: KVCache
    d_cache: KVCache


def draw(
    at: Position,
    L: int,
    T: int = T,
    scale: float = 1.0,
    seed: int = 0,
    num_heads: int = 2,
    num_rows: int = B,
    group: int = 1,
    num_sums: int = ROWS,
) -> DrawnSlice:
    """Normal values; queries are scaled. Each of the `num_heads` heads of keys serves `group` heads
    of queries; `d_cache` has `num_sums` rows.
    """
    random, H, N = np.random.default_rng(seed), num_heads, num_heads * group
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    cache, d_cache = (KVCache(*normal(2, rows, H, T, K)) for rows in (ROWS, num_sums))
    q, d_out = (normal(num_rows, N, L, K) for _ in range(2))
    return DrawnSlice(at, scale * q, cache, d_out, d_cache)


@cache
def compiled(attention: Attention, own: Slice, d_cache: KVCache) -> tuple[Compiled, Compiled]:
    """Both functions ahead of time, so that a position can only be a run-time value."""
    forward, backward = map(jax.jit, attention[:2])
    out, lse = jax.eval_shape(attention.forward, own)
    return (
        forward.lower(own).compile(),
        backward.lower(own, out, lse, own.q_BLNK, d_cache).compile(),
    )


def arguments(
    s: DrawnSlice, layout: Layout, dtype: Any = jnp.float32
) -> tuple[Slice, Array, KVCache]:
    """The slice, `d_out` and `d_cache` as an attention of this layout takes them."""

    def tokens_first(a: np.ndarray, dtype: Any) -> Array:
        return jnp.asarray(a, dtype).swapaxes(1, 2)

    def arranged(cache: KVCache, dtype: Any) -> KVCache:
        return KVCache(*(layout.arranged(tokens_first(a, dtype)) for a in cache))

    at = Position(*map(jnp.int32, s.at))
    own = Slice(tokens_first(s.q, dtype), arranged(s.cache, dtype), at)
    return own, tokens_first(s.d_out, dtype), arranged(s.d_cache, jnp.float32)


def raw(s: DrawnSlice, attention: Attention, dtype: Any = jnp.float32) -> Result:
    """What the attention makes of the slice, and what it leaves in all of `d_cache`."""
    own, d_out, d_cache = arguments(s, attention.layout, dtype)
    shapes = partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype))
    forward, backward = compiled(attention, shapes(own), shapes(d_cache))
    out, lse = forward(own)
    d_q, d_kv, d_cache = backward(own, out, lse, d_out, d_cache)
    d_cache = KVCache(*(attention.layout.heads_first(d, K) for d in d_cache))
    swap = partial(jax.tree.map, lambda a: a.swapaxes(1, 2))
    result = Result(swap(out), swap(lse)[..., None], swap(d_q), swap(d_kv), d_cache)
    return jax.tree.map(np.array, result)


def run(s: DrawnSlice, attention: Attention, dtype: Any = jnp.float32) -> Result:
    """What the attention makes of the slice. The slice's own part of `d_cache`, which nobody may
    read, is 0.
    """
    return _without_itself(s, raw(s, attention, dtype))


def expect(s: DrawnSlice) -> Result:
    """The float64 reference: gradients are added to what is in `d_cache`."""
    k, v = (np.repeat(s.seen(a), s.q.shape[1] // a.shape[1], 1) for a in s.cache)
    out, lse = reference.attention(s.q, k, v)
    d_q, *d_kv = reference.attention_gradients(s.q, k, v, s.d_out)
    d_cache = KVCache(*(np.float64(d) for d in s.d_cache))
    for total, d in zip(d_cache, d_kv, strict=True):
        heads, (_, _, tokens, _) = total.shape[1], d.shape
        s.seen(total)[...] += d.reshape(len(d), heads, -1, tokens, K).sum(2)
    own = KVCache(*(s.itself(d).copy() for d in d_cache))
    return _without_itself(s, Result(out, lse, d_q, own, d_cache))


def _without_itself(s: DrawnSlice, result: Result) -> Result:
    for d in result.d_cache:
        s.itself(d)[...] = 0
    return result


def rounded(s: DrawnSlice, dtype: Any) -> DrawnSlice:
    """The slice with values that the dtype has, and no gradients of keys and values yet."""
    q, cache, d_out = jax.tree.map(
        lambda a: np.asarray(jnp.asarray(a, dtype), np.float32), (s.q, s.cache, s.d_out)
    )
    return DrawnSlice(s.at, q, cache, d_out, jax.tree.map(np.zeros_like, s.d_cache))
