"""Attention of a slice by a fused kernel that knows neither positions nor caches.

A kernel aligns its causal mask with the first query and the first key. This is right where the
slice attends to itself, and wrong over its context. So the kernel is called once with the causal
mask for the slice itself, and once without it for each group of keys of the context. The results
are merged by their log-sum-exp. Backward, every call receives the merged output and log-sum-exp,
from which it computes the weights of the whole softmax and their gradients (the backward pass of
FlashAttention-2, arXiv 2307.08691, works in the same way on its blocks).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from tpipe_jax.attention.base import (
    BY_HEADS,
    TOKENS_FIRST,
    Attention,
    KVCache,
    Slice,
    add_to_cache,
)
from tpipe_jax.attention.blockwise import attend, attend_backward, over_context
from tpipe_jax.devices.inplace import Position, in_shared_rows


class Kernel(NamedTuple):
    """A fused kernel for queries `[B, L, H, K]` and any number of keys and values.

    If `num_visible` is None, there are as many keys as queries, and the mask is causal. Otherwise
    all queries see the first `num_visible` keys; it is an int32 scalar of at least 1.
    """

    forward: Callable[[Array, KVCache, Array | None], tuple[Array, Array]]
    """`(q, kv, num_visible)` to the output, and the log-sum-exp `[B, L, H]` in float32."""
    backward: Callable[
        [Array, KVCache, Array | None, Array, Array, Array], tuple[Array, Array, Array]
    ]
    """`(q, kv, num_visible, out, lse, d_out)` to the gradients of q, k and v; the gradients of
    invisible keys and values may be anything."""
    min_tokens: int
    """The fewest queries, and the fewest keys, that the kernel accepts."""


class _Grouped(NamedTuple):
    """Attention by a kernel, which reads the context in groups of `group` keys."""

    kernel: Kernel
    group: int

    def forward(self, slice_: Slice) -> tuple[Array, Array]:
        """As `Attention.forward`, for sequences that are one document each."""
        q_BLHK, _, at, starts_BL1 = slice_
        assert starts_BL1 is None
        if self.kernel.min_tokens > slice_.num_tokens:
            return attend(slice_, layout=TOKENS_FIRST)

        def fold(state: tuple[Array, Array], size: int, first: Array, num_visible: Array):
            out, lse = state
            keys = _read(slice_, Position(at.row, first), size)
            group_out, group_lse = self.kernel.forward(q_BLHK, keys, num_visible)
            merged = jnp.logaddexp(lse, group_lse)
            shares = jnp.exp(lse - merged), jnp.exp(group_lse - merged)
            return out * shares[0][..., None] + group_out * shares[1][..., None], merged

        out, lse = self.kernel.forward(q_BLHK, _read(slice_, at, slice_.num_tokens), None)
        out, lse = self._over_groups(slice_, fold, (out.astype(jnp.float32), lse))
        return out.astype(q_BLHK.dtype), lse

    def backward(
        self,
        slice_: Slice,
        out_BLHK: Array,
        lse_BLH: Array,
        d_out_BLHK: Array,
        d_cache: KVCache,
    ) -> tuple[Array, KVCache, KVCache]:
        """As `Attention.backward`, for sequences that are one document each."""
        q_BLHK, cache, at, starts_BL1 = slice_
        assert starts_BL1 is None
        B, L, _, K = q_BLHK.shape
        results = out_BLHK, lse_BLH, d_out_BLHK
        if self.kernel.min_tokens > L:
            return attend_backward(slice_, *results, d_cache, layout=TOKENS_FIRST)

        def fold(state: tuple[Array, KVCache], size: int, first: Array, num_visible: Array):
            d_q, d_cache = state
            where = Position(at.row, first)
            keys = _read(slice_, where, size)
            group_d_q, *d_kv = self.kernel.backward(q_BLHK, keys, num_visible, *results)
            is_visible = jnp.arange(size)[:, None] < num_visible
            d_kv = KVCache(*(jnp.where(is_visible, TOKENS_FIRST.arranged(d), 0) for d in d_kv))
            where = in_shared_rows(where, d_cache.k, len(cache.k))
            return d_q + group_d_q, add_to_cache(d_cache, d_kv, where, size)

        d_q, *d_kv = self.kernel.backward(q_BLHK, _read(slice_, at, L), None, *results)
        d_q, d_cache = self._over_groups(slice_, fold, (d_q.astype(jnp.float32), d_cache))
        # Read now: before the loop, XLA would copy the sums for it.
        d_at = in_shared_rows(at, d_cache.k, len(cache.k))
        sums = (TOKENS_FIRST.read(d, d_at, B, L, K) for d in d_cache)
        own = KVCache(*((a + d).astype(d.dtype) for a, d in zip(sums, d_kv, strict=True)))
        return d_q.astype(q_BLHK.dtype), own, d_cache

    def _over_groups(
        self, slice_: Slice, fold: Callable[[Any, int, Array, Array], Any], state: Any
    ) -> Any:
        """Calls `state = fold(state, size, first_key, num_visible)` for each group of keys of the
        context. Returns the state.
        """
        at, seq_len = slice_.at, slice_.cache.k.shape[1]
        if slice_.num_tokens == seq_len:
            return state  # a whole sequence has no context
        size = min(self.group, seq_len)
        return over_context(at.token, size, lambda state, *where: fold(state, size, *where), state)


def grouped(kernel: Kernel, group: int) -> Attention:
    """Makes an attention that calls the kernel and reads contexts in groups of `group` keys. Slices
    that are too short for the kernel use `blockwise.attend` instead.
    """
    assert group >= kernel.min_tokens
    own = _Grouped(kernel, group)
    return Attention(own.forward, own.backward, group, group, TOKENS_FIRST)


def _read(slice_: Slice, at: Position, num_tokens: int) -> KVCache:
    """Returns keys and values `[B, T, H, K]` from a position on."""
    B, _, _, K = slice_.q_BLNK.shape
    return KVCache(*(TOKENS_FIRST.read(c, at, B, num_tokens, K) for c in slice_.cache))


def over_heads(attention: Attention) -> Attention:
    """Returns the attention with its heads divided over 'model' by hand, since GSPMD does not look
    into kernels. For code in a `shard_map` that leaves the axis 'model' automatic.
    """
    heads: Any = BY_HEADS  # in the place of arrays, so of any type
    spec: Any = attention.layout.spec
    cache: Any = KVCache(spec, spec)
    whole: Any = PartitionSpec()
    own = Slice(heads, cache, whole, whole)

    def divided(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(function, axis_names={"model"}, in_specs=in_specs, out_specs=out_specs)

    return attention._replace(
        forward=divided(attention.forward, (own,), (heads, heads)),
        backward=divided(
            attention.backward,
            (own, heads, heads, heads, cache),
            (heads, KVCache(heads, heads), cache),
        ),
    )
