"""Causal attention of one token slice over its context, in blocks, forward and backward.

The keys and values of a sequence lie in a cache as long as the sequence. A slice attends to all
tokens before it in the cache and to itself. The loop over the key blocks of the context has a
run-time trip count. So time follows the actual context of a slice, and one compiled body serves
every slice of one length, wherever it lies.

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

from tpipe_jax.attention.base import MASKED, Attention, KVCache, Slice, add_to_cache
from tpipe_jax.devices.inplace import Position, in_shared_rows, read, write
from tpipe_jax.devices.scopes import CONTEXT
from tpipe_jax.planning.context_blocks import BLOCK, query_block

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def blockwise(block: int) -> Attention:
    """Makes an attention that works in blocks of `block` keys and about as many queries."""
    return Attention(partial(attend, block=block), partial(attend_backward, block=block), block)


def attend(slice_: Slice, block: int = BLOCK) -> tuple[Array, Array]:
    """Computes the attention of a slice, as `Attention.forward`, in blocks of `block` keys."""
    q_BNLK, cache, at, starts_BL1 = slice_
    (B, N, L, K), (_, H, T, _) = q_BNLK.shape, cache.k.shape
    chex.assert_shape(cache, (None, H, None, K))
    key_block = min(block, T)

    def one_block(start: Array | int, size: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        here, context = Position(0, start), at.token + start
        q = _to_keys(read(q_BNLK, here, B, size), H) * K**-0.5
        is_visible, lowest = _visibility(starts_BL1, here, context, q_BNLK, size, H)

        def fold(
            state: tuple[Array, Array, Array], first_key: Array | int, num_keys: int, visible: Array
        ):
            top, total, out = state
            k, v = (read(c, Position(at.row, first_key), B, num_keys) for c in cache)
            visible = is_visible(first_key, visible)
            score = jnp.where(visible, _dot("bhqe,bhke->bhqk", q, k), MASKED)
            new_top = jnp.maximum(top, score.max(-1, keepdims=True))
            weight, rescale = jnp.exp(score - new_top), jnp.exp(top - new_top)
            out = out * rescale + _dot("bhqk,bhke->bhqe", weight.astype(v.dtype), v)
            return new_top, total * rescale + weight.sum(-1, keepdims=True), out

        zeros = jnp.zeros_like(q, jnp.float32)
        nothing = zeros[..., :1] + MASKED, zeros[..., :1], zeros
        state = fold(nothing, context, size, _causal(size, N // H))
        state = over_context(context, key_block, _masked(fold, key_block), state, lowest)
        top, total, out = state
        return (
            write(carry[0], _to_queries(out / total, N), here),
            write(carry[1], _to_queries(top + jnp.log(total), N), here),
        )

    empty = jnp.zeros_like(q_BNLK), jnp.zeros_like(q_BNLK[..., :1], jnp.float32)
    return _over_queries(L, block, one_block, empty)


def attend_backward(
    slice_: Slice,
    out_BNLK: Array,
    lse_BNL1: Array,
    d_out_BNLK: Array,
    d_cache: KVCache,
    block: int = BLOCK,
) -> tuple[Array, KVCache]:
    """Computes the gradients of `attend`, as `Attention.backward`."""
    q_BNLK, cache, at, starts_BL1 = slice_
    (B, N, L, K), (_, H, T, _) = q_BNLK.shape, cache.k.shape
    key_block = min(block, T)
    delta_BNL1 = (d_out_BNLK.astype(jnp.float32) * out_BNLK.astype(jnp.float32)).sum(
        -1, keepdims=True
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
            k, v = (read(c, keys, B, num_keys) for c in cache)
            visible = is_visible(first_key, visible)
            weight = jnp.where(visible, jnp.exp(_dot("bhqe,bhke->bhqk", q, k) - lse), 0)
            d_weight = _dot("bhqe,bhke->bhqk", d_out, v)
            d_score = (weight * (d_weight - delta)).astype(q.dtype)
            d_k = _dot("bhqk,bhqe->bhke", d_score, q)
            d_v = _dot("bhqk,bhqe->bhke", weight.astype(q.dtype), d_out)
            d_cache = add_to_cache(
                d_cache, KVCache(d_k, d_v), in_shared_rows(keys, d_cache.k, len(cache.k))
            )
            return d_q + _dot("bhqk,bhke->bhqe", d_score, k), d_cache

        d_q_BNLK, d_cache = carry
        nothing = jnp.zeros_like(q, jnp.float32), d_cache
        state = fold(nothing, context, size, _causal(size, N // H))
        state = over_context(context, key_block, _masked(fold, key_block), state, lowest)
        d_q, d_cache = state
        return write(d_q_BNLK, _to_queries(d_q * K**-0.5, N), here), d_cache

    return _over_queries(L, block, one_block, (jnp.zeros_like(q_BNLK), d_cache))


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


def _causal(size: int, group: int) -> Array:
    """Returns the causal mask of a block of queries over itself, repeated for the `group` heads of
    queries that share a head of keys.
    """
    return jnp.tile(jnp.arange(size)[:, None] >= jnp.arange(size)[None, :], (group, 1))


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
