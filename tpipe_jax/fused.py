"""Attention of a slice by a fused kernel that knows neither positions nor caches.

A kernel masks from its top left corner, which is right where the slice attends to itself and wrong
over its context. So the slice is a causal call, its context one call for each group of keys, and
their results are merged by their log-sum-exp. Backward, every call is given the merged output and
log-sum-exp: from these it computes the weights of the whole softmax and their gradients (the
backward pass of FlashAttention-2, arXiv 2307.08691, works in the same way on its blocks).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import PartitionSpec

from tpipe_jax.attention import Attention, KVCache, blockwise, over_context
from tpipe_jax.inplace import Position, read, write


class Kernel(NamedTuple):
    """A fused kernel, on queries `[B, H, L, K]` and as many keys and values as it is given.

    Where `num_visible` is None, there are as many keys as queries, and the mask is causal; else all
    queries see the first `num_visible` of the keys, an int32 scalar of at least 1.
    """

    forward: Callable[[Array, KVCache, Array | None], tuple[Array, Array]]
    """`(q, kv, num_visible)` to the output, and the log-sum-exp `[B, H, L, 1]` in float32."""
    backward: Callable[
        [Array, KVCache, Array | None, Array, Array, Array], tuple[Array, Array, Array]
    ]
    """`(q, kv, num_visible, out, lse, d_out)` to the gradients of q, k and v."""
    min_queries: int
    """Of the shortest slice that it can do."""
    key_block: int
    """Keys that it reads together."""


def grouped(kernel: Kernel, group: int) -> Attention:
    """Attention by the kernel, with contexts in groups of so many keys."""
    short = blockwise(kernel.key_block)

    def groups(q_BHLK: Array, cache: KVCache, at: Position):
        """The keys of the slice, those of a group, and how many a group has."""
        B, _, L, _ = q_BHLK.shape
        size = min(group, cache.k.shape[2])

        def keys(first: Array | int, num_keys: int) -> KVCache:
            return KVCache(*(read(c, Position(at.row, first), B, num_keys) for c in cache))

        return keys(at.token, L), lambda first: keys(first, size), size

    def forward(q_BHLK: Array, cache: KVCache, at: Position) -> tuple[Array, Array]:
        if q_BHLK.shape[2] < kernel.min_queries:
            return short.forward(q_BHLK, cache, at)
        own, group_at, size = groups(q_BHLK, cache, at)

        def fold(state: tuple[Array, Array], first: Array, num_visible: Array):
            out, lse = state
            group_out, group_lse = kernel.forward(q_BHLK, group_at(first), num_visible)
            merged = jnp.logaddexp(lse, group_lse)
            shares = jnp.exp(lse - merged), jnp.exp(group_lse - merged)
            return out * shares[0] + group_out * shares[1], merged

        out, lse = kernel.forward(q_BHLK, own, None)
        out, lse = over_context(at.token, size, fold, (out.astype(jnp.float32), lse))
        return out.astype(q_BHLK.dtype), lse

    def backward(
        q_BHLK: Array,
        cache: KVCache,
        at: Position,
        out_BHLK: Array,
        lse_BHL1: Array,
        d_out_BHLK: Array,
        d_cache: KVCache,
    ) -> tuple[Array, KVCache]:
        results = out_BHLK, lse_BHL1, d_out_BHLK
        if q_BHLK.shape[2] < kernel.min_queries:
            return short.backward(q_BHLK, cache, at, *results, d_cache)
        own, group_at, size = groups(q_BHLK, cache, at)

        def add(d_cache: KVCache, first: Array | int, d_k: Array, d_v: Array) -> KVCache:
            where = Position(at.row, first)
            B, _, num_keys, _ = d_k.shape

            def added(total: Array, d: Array) -> Array:
                return write(total, read(total, where, B, num_keys) + d, where)

            return KVCache(added(d_cache.k, d_k), added(d_cache.v, d_v))

        def fold(state: tuple[Array, KVCache], first: Array, num_visible: Array):
            d_q, d_cache = state
            group_d_q, *d_kv = kernel.backward(q_BHLK, group_at(first), num_visible, *results)
            return d_q + group_d_q, add(d_cache, first, *d_kv)

        d_q, *d_kv = kernel.backward(q_BHLK, own, None, *results)
        state = d_q.astype(jnp.float32), add(d_cache, at.token, *d_kv)
        d_q, d_cache = over_context(at.token, size, fold, state)
        return d_q.astype(q_BHLK.dtype), d_cache

    return Attention(forward, backward, kernel.key_block)


def over_heads(attention: Attention) -> Attention:
    """The attention with its heads divided over 'model' by hand, since GSPMD does not look into
    kernels. For code in a `shard_map` that leaves this axis automatic.
    """
    heads, whole = PartitionSpec(None, "model"), PartitionSpec()

    def divided(function: Callable, num_heads_args: int) -> Callable:
        """Of arguments q, cache and position, and so many more with heads."""
        in_specs = (heads, heads, whole, *(heads,) * num_heads_args)
        return jax.shard_map(function, axis_names={"model"}, in_specs=in_specs, out_specs=heads)

    return attention._replace(
        forward=divided(attention.forward, 0), backward=divided(attention.backward, 4)
    )


def cudnn_version() -> int | None:
    """As 91002 for 9.10.2; None where jax finds no cuDNN."""
    try:
        return cudnn.check_cudnn_version()
    except RuntimeError:
        return None


def cudnn_kernel() -> Kernel:
    """cuDNN's flash attention, for float16 and bfloat16.

    jax's public function of it has no gradient for a merged softmax: it gives the log-sum-exp, but
    takes none. So its primitives are bound here, which jax's own backward pass does likewise; tests
    hold each jax release to their parameters.
    """

    def call(primitive, q: Array, kv: KVCache, num_visible: Array | None, *results: Array, **more):
        B, _, L, K = q.shape
        none = jnp.zeros(0, q.dtype)  # of bias, packed sequences and paged caches
        if num_visible is None:
            mask, lengths = cudnn.MaskType.CAUSAL, (none, none)
        else:
            mask = cudnn.MaskType.PADDING
            lengths = jnp.full(B, L, jnp.int32), jnp.broadcast_to(num_visible, B).astype(jnp.int32)
        return primitive.bind(
            *(q, *kv, none, *lengths, none, none, none, none, *results),
            scale=K**-0.5,
            seed=0,
            dropout_rate=0.0,
            variadic_args=(False, False),  # neither bias nor its gradient
            mask_type=mask,
            layout=cudnn.AttentionLayout.BNTH.value,
            sliding_window_length=None,
            **more,
        )

    def forward(q: Array, kv: KVCache, num_visible: Array | None) -> tuple[Array, Array]:
        out, lse = call(cudnn._dot_product_attention_fwd_p, q, kv, num_visible, is_training=True)
        return out, lse[..., None]

    def backward(
        q: Array, kv: KVCache, num_visible: Array | None, out: Array, lse: Array, d_out: Array
    ) -> tuple[Array, Array, Array]:
        results = lse[..., 0], out, d_out.astype(q.dtype)
        return tuple(call(cudnn._dot_product_attention_bwd_p, q, kv, num_visible, *results))

    # It has no backward pass for a single query (pytorch issue 138529), and none for fewer than 64
    # in older releases (TransformerEngine issue 341).
    return Kernel(forward, backward, min_queries=64, key_block=128)
