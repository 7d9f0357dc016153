"""Causal attention of one token slice over its context, in blocks, forward and backward.

The keys and values of a sequence lie in a cache as long as the sequence; a slice attends to
everything before it there and to itself. Both loops, over query blocks and over the key blocks of
the context, have run-time trip counts: time follows the context that a slice really has, and one
compiled body serves every slice of one length, wherever it lies.

`Attention` is what the stages call; `blockwise` makes it of XLA's operators, for any device and
dtype. Others are in `fused`, and `backends` chooses.

Softmax over blocks keeps a running maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867);
the backward pass recomputes the weights from the saved log-sum-exp (FlashAttention, arXiv
2205.14135). Only the block on the diagonal has the causal mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
from jax import Array, lax

from tpipe_jax.blocks import BLOCK, query_block
from tpipe_jax.inplace import Position, read, write

MASKED = -1e30  # finite, so that the difference of two masked scores is not NaN

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


class KVCache(NamedTuple):
    """Keys and values of the sequences, `[B, H, T, K]` each, or their gradients."""

    k: Array
    v: Array


class Attention(NamedTuple):
    """A way to compute attention, forward and backward."""

    forward: Callable[[Array, KVCache, Position], tuple[Array, Array]]
    """As `attend`."""
    backward: Callable[
        [Array, KVCache, Position, Array, Array, Array, KVCache], tuple[Array, KVCache]
    ]
    """As `attend_backward`."""
    key_block: int
    """Keys that are read together: the time of a context grows in such steps."""


def blockwise(block: int) -> Attention:
    """Attention in blocks of so many keys, and about as many queries."""
    return Attention(partial(attend, block=block), partial(attend_backward, block=block), block)


def attend(q_BHLK: Array, cache: KVCache, at: Position, block: int = BLOCK) -> tuple[Array, Array]:
    """Attention of the slice at a position, whose keys and values are in the cache already.

    Returns the output, `[B, H, L, K]` in the dtype of q, and the log-sum-exp of each row of scores,
    `[B, H, L, 1]` float32.
    """
    B, H, L, K = q_BHLK.shape
    chex.assert_shape(cache, (None, H, None, K))
    key_block = min(block, cache.k.shape[2])

    def one_block(start: Array | int, size: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        q = read(q_BHLK, Position(0, start), B, size) * K**-0.5
        context = at.token + start

        def fold(
            state: tuple[Array, Array, Array], first_key: Array | int, num_keys: int, visible: Array
        ):
            top, total, out = state
            k, v = (read(c, Position(at.row, first_key), B, num_keys) for c in cache)
            score = jnp.where(visible, _dot("bhqe,bhke->bhqk", q, k), MASKED)
            new_top = jnp.maximum(top, score.max(-1, keepdims=True))
            weight, rescale = jnp.exp(score - new_top), jnp.exp(top - new_top)
            out = out * rescale + _dot("bhqk,bhke->bhqe", weight.astype(v.dtype), v)
            return new_top, total * rescale + weight.sum(-1, keepdims=True), out

        zeros = jnp.zeros_like(q, jnp.float32)
        nothing = zeros[..., :1] + MASKED, zeros[..., :1], zeros
        state = fold(nothing, context, size, _causal(size))
        top, total, out = over_context(context, key_block, _masked(fold, key_block), state)
        here = Position(0, start)
        return write(carry[0], out / total, here), write(carry[1], top + jnp.log(total), here)

    empty = jnp.zeros_like(q_BHLK), jnp.zeros_like(q_BHLK[..., :1], jnp.float32)
    return _over_queries(L, block, one_block, empty)


def attend_backward(
    q_BHLK: Array,
    cache: KVCache,
    at: Position,
    out_BHLK: Array,
    lse_BHL1: Array,
    d_out_BHLK: Array,
    d_cache: KVCache,
    block: int = BLOCK,
) -> tuple[Array, KVCache]:
    """Gradients of `attend`, given its results and the gradient with respect to its output.

    Adds this slice's share to `d_cache`, float32, for its own and for all earlier keys and values;
    the sums of a slice are complete once all later slices and the slice itself have been here.
    Returns the gradient with respect to q and the new `d_cache`.
    """
    B, _, L, K = q_BHLK.shape
    key_block = min(block, cache.k.shape[2])
    delta_BHL1 = (d_out_BHLK.astype(jnp.float32) * out_BHLK.astype(jnp.float32)).sum(
        -1, keepdims=True
    )

    def one_block(
        start: Array | int, size: int, carry: tuple[Array, KVCache]
    ) -> tuple[Array, KVCache]:
        here = Position(0, start)
        q = read(q_BHLK, here, B, size) * K**-0.5
        d_out, lse, delta = (read(a, here, B, size) for a in (d_out_BHLK, lse_BHL1, delta_BHL1))
        context = at.token + start

        def fold(
            state: tuple[Array, KVCache], first_key: Array | int, num_keys: int, visible: Array
        ):
            d_q, d_cache = state
            keys = Position(at.row, first_key)
            k, v = (read(c, keys, B, num_keys) for c in cache)
            weight = jnp.where(visible, jnp.exp(_dot("bhqe,bhke->bhqk", q, k) - lse), 0)
            d_weight = _dot("bhqe,bhke->bhqk", d_out, v)
            d_score = (weight * (d_weight - delta)).astype(q.dtype)
            d_k = _dot("bhqk,bhqe->bhke", d_score, q)
            d_v = _dot("bhqk,bhqe->bhke", weight.astype(q.dtype), d_out)
            d_cache = KVCache(
                write(d_cache.k, read(d_cache.k, keys, B, num_keys) + d_k, keys),
                write(d_cache.v, read(d_cache.v, keys, B, num_keys) + d_v, keys),
            )
            return d_q + _dot("bhqk,bhke->bhqe", d_score, k), d_cache

        d_q_BHLK, d_cache = carry
        state = fold((jnp.zeros_like(q, jnp.float32), d_cache), context, size, _causal(size))
        d_q, d_cache = over_context(context, key_block, _masked(fold, key_block), state)
        return write(d_q_BHLK, d_q * K**-0.5, here), d_cache

    return _over_queries(L, block, one_block, (jnp.zeros_like(q_BHLK), d_cache))


def over_context(
    context: Array | int, block: int, fold: Callable[[Any, Array, Array], Any], state: Any
) -> Any:
    """Folds the tokens before `context` into the state, block by block, the last block first:
    `fold(state, first_key, num_visible)`.

    The blocks end at `context`, so the one at the start of the sequence may be short: it is read in
    full all the same, and only the first `num_visible` of its keys count.
    """

    def one_block(i: Array, state: Any) -> Any:
        stop = context - i * block
        first = jnp.maximum(stop - block, 0)
        return fold(state, first, stop - first)

    return lax.fori_loop(0, (context + block - 1) // block, one_block, state)


def _masked(fold: Callable[..., Any], block: int) -> Callable[[Any, Array, Array], Any]:
    """Gives a fold the mask of a block's visible keys."""

    def masked(state: Any, first_key: Array, num_visible: Array) -> Any:
        return fold(state, first_key, block, jnp.arange(block) < num_visible)

    return masked


def _over_queries(
    num_queries: int, block: int, work: Callable[[Array | int, int, Any], Any], carry: Any
) -> Any:
    """Runs `work(start, size, carry)` over all blocks of queries; a shorter one comes last."""
    size = query_block(num_queries, block)
    num_full, rest = divmod(num_queries, size)
    if num_full == 1:
        carry = work(0, size, carry)
    else:
        carry = lax.fori_loop(0, num_full, lambda i, carry: work(i * size, size, carry), carry)
    return work(num_full * size, rest, carry) if rest else carry


def _causal(size: int) -> Array:
    return jnp.arange(size)[:, None] >= jnp.arange(size)[None, :]
