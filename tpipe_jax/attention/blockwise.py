"""Causal attention of one token slice over its context, in blocks, forward and backward.

The keys and values of a sequence lie in a cache as long as the sequence. A slice attends to all
tokens before it in the cache and to itself. The loop over the key blocks of the context has a
run-time trip count. So time follows the actual context of a slice, and one compiled body serves
every slice of one length, wherever it lies. Heads come before tokens here, as batched products of
XLA want them.

The stages call an `Attention`. `blockwise` makes one from XLA's operators, for any device and
dtype; `fused` has others, and `backends` chooses.

Softmax over blocks keeps a running maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867).
The backward pass recomputes the weights from the saved log-sum-exp (FlashAttention, arXiv
2205.14135). Only the block on the diagonal has the causal mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

from tpipe_jax.attention.base import (
    HEADS_FIRST,
    MASKED,
    Attention,
    Heads,
    KVCache,
    Layout,
    Slice,
    add_to_cache,
)
from tpipe_jax.devices.inplace import Position, in_shared_rows, read, write
from tpipe_jax.devices.scopes import CONTEXT
from tpipe_jax.planning.context_blocks import BLOCK, query_block

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def blockwise(block: int, reads_whole: bool = False) -> Attention:
    """Makes an attention that works in blocks of `block` keys and about as many queries. With
    `reads_whole`, slices of at most `block` tokens read whole sequences at once, and mask what they
    do not see: more work in fewer kernels.
    """
    how: Any = {"block": block, "reads_whole": reads_whole}
    return Attention(
        partial(attend, **how), partial(attend_backward, **how), block, block, HEADS_FIRST
    )


def attend(
    slice_: Slice, block: int = BLOCK, layout: Layout = HEADS_FIRST, reads_whole: bool = False
) -> tuple[Array, Array]:
    """Computes the attention of a slice, as `Attention.forward`, in blocks of `block` keys."""
    q_BLNK, cache, at, starts_BL1 = slice_
    (B, L, N, K), (H, T) = q_BLNK.shape, _shape(slice_, layout)
    reads_whole &= block >= L
    key_block, q_BNLK = min(block, T), _swapped(q_BLNK)

    def one_block(start: Array | int, size: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        here, context = Position(0, start), at.token + start
        q = _to_keys(read(q_BNLK, here, B, size), H) * K**-0.5
        is_visible, lowest = _visibility(starts_BL1, here, context, q_BNLK, size, H)

        def weights(first_key: Array | int, num_keys: int, visible: Array, top: Array | None):
            k, v = (
                layout.heads_first(read(c, Position(at.row, first_key), B, num_keys), K)
                for c in cache
            )
            visible = is_visible(first_key, visible)
            score = jnp.where(visible, _dot("bhqe,bhke->bhqk", q, k), MASKED)
            new_top = score.max(-1, keepdims=True)
            new_top = new_top if top is None else jnp.maximum(top, new_top)
            weight = jnp.exp(score - new_top)
            out = _dot("bhqk,bhke->bhqe", weight.astype(v.dtype), v)
            return new_top, weight.sum(-1, keepdims=True), out

        def fold(
            state: tuple[Array, Array, Array], first_key: Array | int, num_keys: int, visible: Array
        ) -> tuple[Array, Array, Array]:
            top, total, out = state
            new_top, more, more_out = weights(first_key, num_keys, visible, top)
            rescale = jnp.exp(top - new_top)
            return new_top, total * rescale + more, out * rescale + more_out

        if reads_whole:
            top, total, out = weights(0, T, _causal(size, N // H, context, T), None)
        else:
            state = weights(context, size, _causal(size, N // H), None)
            state = over_context(context, key_block, _masked(fold, key_block), state, lowest)
            top, total, out = state
        return (
            write(carry[0], _to_queries(out / total, N), here),
            write(carry[1], _to_queries(top + jnp.log(total), N), here),
        )

    empty = jnp.zeros_like(q_BNLK), jnp.zeros_like(q_BNLK[..., :1], jnp.float32)
    out_BNLK, lse_BNL1 = _over_queries(L, block, one_block, empty)
    return _swapped(out_BNLK), _swapped(lse_BNL1)[..., 0]


def attend_backward(
    slice_: Slice,
    out_BLNK: Array,
    lse_BLN: Array,
    d_out_BLNK: Array,
    d_cache: KVCache,
    block: int = BLOCK,
    layout: Layout = HEADS_FIRST,
    reads_whole: bool = False,
) -> tuple[Array, KVCache, KVCache]:
    """Computes the gradients of `attend`, as `Attention.backward`."""
    q_BLNK, cache, at, starts_BL1 = slice_
    (B, L, N, K), (H, T) = q_BLNK.shape, _shape(slice_, layout)
    reads_whole &= block >= L
    key_block, dtype = min(block, T), q_BLNK.dtype
    q_BNLK, d_out_BNLK, lse_BNL1 = map(_swapped, (q_BLNK, d_out_BLNK, lse_BLN[..., None]))
    delta_BNL1 = _swapped(
        (d_out_BLNK.astype(jnp.float32) * out_BLNK.astype(jnp.float32)).sum(-1, keepdims=True)
    )

    def one_block(
        start: Array | int, size: int, carry: tuple[Array, KVCache]
    ) -> tuple[Array, KVCache]:
        here, context = Position(0, start), at.token + start
        q = _to_keys(read(q_BNLK, here, B, size), H) * K**-0.5
        d_out, lse, delta = (
            _to_keys(read(a, here, B, size), H) for a in (d_out_BNLK, lse_BNL1, delta_BNL1)
        )
        is_visible, lowest = _visibility(starts_BL1, here, context, q_BNLK, size, H)

        def fold(
            state: tuple[Array, KVCache], first_key: Array | int, num_keys: int, visible: Array
        ):
            d_q, d_cache = state
            keys = Position(at.row, first_key)
            k, v = (layout.heads_first(read(c, keys, B, num_keys), K) for c in cache)
            visible = is_visible(first_key, visible)
            weight = jnp.where(visible, jnp.exp(_dot("bhqe,bhke->bhqk", q, k) - lse), 0)
            d_weight = _dot("bhqe,bhke->bhqk", d_out, v)
            d_score = (weight * (d_weight - delta)).astype(q.dtype)
            d_k = _dot("bhqk,bhqe->bhke", d_score, q)
            d_v = _dot("bhqk,bhqe->bhke", weight.astype(q.dtype), d_out)
            d_kv = KVCache(*(layout.arranged(_swapped(d)) for d in (d_k, d_v)))
            where = in_shared_rows(keys, d_cache.k, len(cache.k))
            return d_q + _dot("bhqk,bhke->bhqe", d_score, k), add_to_cache(
                d_cache, d_kv, where, num_keys
            )

        d_q_BNLK, d_cache = carry
        nothing = jnp.zeros_like(q, jnp.float32), d_cache
        if reads_whole:
            d_q, d_cache = fold(nothing, 0, T, _causal(size, N // H, context, T))
        else:
            state = fold(nothing, context, size, _causal(size, N // H))
            state = over_context(context, key_block, _masked(fold, key_block), state, lowest)
            d_q, d_cache = state
        return write(d_q_BNLK, _to_queries(d_q * K**-0.5, N), here), d_cache

    d_q_BNLK, d_cache = _over_queries(L, block, one_block, (jnp.zeros_like(q_BNLK), d_cache))
    where = in_shared_rows(at, d_cache.k, len(cache.k))
    own = (layout.read(d, where, B, L, K).astype(dtype) for d in d_cache)
    return _swapped(d_q_BNLK), KVCache(*own), d_cache


def over_context(
    context: Array | int,
    block: int,
    fold: Callable[[Any, Array, Array], Any],
    state: Any,
    lowest: Array | int = 0,
) -> Any:
    """Calls `state = fold(state, first_key, num_visible)` for each block of keys before `context`,
    from the last block back to the one that holds `lowest`. Returns the state.

    The blocks are counted back from `context`, so the block at the start of the sequence may be
    short. It is read in full all the same, but only the first `num_visible` of its keys count.
    """

    def one_block(i: Array, state: Any) -> Any:
        stop = context - i * block
        first = jnp.maximum(stop - block, 0)
        return fold(state, first, stop - first)

    with jax.named_scope(CONTEXT):
        return lax.fori_loop(0, (context - lowest + block - 1) // block, one_block, state)


def _masked(fold: Callable[..., Any], block: int) -> Callable[[Any, Array, Array], Any]:
    """Returns a fold for `over_context`, which gives `fold` the mask of a block's visible keys."""

    def masked(state: Any, first_key: Array, num_visible: Array) -> Any:
        return fold(state, first_key, block, jnp.arange(block) < num_visible)

    return masked


def _over_queries(
    num_queries: int, block: int, work: Callable[[Array | int, int, Any], Any], carry: Any
) -> Any:
    """Calls `work(start, size, carry)` for each block of queries, and returns the carry. The last
    block may be shorter.
    """
    size = query_block(num_queries, block)
    num_full, rest = divmod(num_queries, size)
    if num_full == 1:
        carry = work(0, size, carry)
    else:
        carry = lax.fori_loop(0, num_full, lambda i, carry: work(i * size, size, carry), carry)
    return work(num_full * size, rest, carry) if rest else carry


def _shape(slice_: Slice, layout: Layout) -> tuple[int, int]:
    """The heads and tokens of the cache."""
    q_BLNK, cache, _, _ = slice_
    K = q_BLNK.shape[-1]
    H, T = layout.num_heads(cache, K), cache.k.shape[-2]
    chex.assert_shape(cache, (len(cache.k), *layout.shape(1, T, Heads(0, H, K))[1:]))
    return H, T


def _swapped(a: Array) -> Array:
    """Swaps heads and tokens."""
    return a.swapaxes(1, 2)


def _causal(size: int, group: int, context: Array | int = 0, num_keys: int | None = None) -> Array:
    """Returns the causal mask of a block of queries over itself, or, if `num_keys` is given, over
    so many keys from the start of the sequence. It is repeated for the `group` heads of queries
    that share a head of keys.
    """
    queries, keys = jnp.arange(size)[:, None], jnp.arange(num_keys or size)
    return jnp.tile(context + queries >= keys, (group, 1))


def _to_keys(a_BNLK: Array, num_keys: int) -> Array:
    """Joins the G heads of queries that share a head of keys into one longer slice,
    `[B, H, G L, K]`.
    """
    B, _, _, K = a_BNLK.shape
    return a_BNLK.reshape(B, num_keys, -1, K)


def _to_queries(a_BHLK: Array, num_queries: int) -> Array:
    """The inverse of `_to_keys`."""
    B, _, _, K = a_BHLK.shape
    return a_BHLK.reshape(B, num_queries, -1, K)


def _visibility(
    starts_BL1: Array | None,
    at: Position,
    context: Array | int,
    q_BNLK: Array,
    size: int,
    num_keys: int,
) -> tuple[Callable[[Array | int, Array], Array], Array | int]:
    """Returns a mask function and the first key that the block of queries sees, at most `context`.

    The function takes the first key of a block and its mask, and also masks the keys before the
    starts of documents.
    """
    if starts_BL1 is None:
        return lambda first_key, visible: visible, 0
    B, N, _, _ = q_BNLK.shape
    starts_BL1 = read(starts_BL1, at, B, size)
    starts_B1Q1 = jnp.tile(starts_BL1, (1, N // num_keys, 1))[:, None]

    def is_visible(first_key: Array | int, visible: Array) -> Array:
        return visible & (first_key + jnp.arange(visible.shape[-1]) >= starts_B1Q1)

    return is_visible, jnp.minimum(starts_BL1.min(), context)
