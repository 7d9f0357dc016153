"""Embedding, head and cross-entropy, with the vocabulary sharded so that all stages share them.

Code of one device inside `shard_map`, with the axis 'pipe' manual; each stage holds V / P rows of
the tied embedding (and GSPMD divides those over 'model'). Rows beyond the vocabulary are padding.
As Megatron-LM's parallel cross-entropy (Shoeybi et al. 2019, section 3), with all-reduces over
'pipe' only.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

from tpipe_jax.attention import MASKED
from tpipe_jax.model import Params, final_norm
from tpipe_jax.pipeline import pmax, psum, sum_over, varying

IGNORE = -1  # a target that does not count
CHUNK = 1024  # tokens whose logits are in memory at a time


class Head(NamedTuple):
    """Parameters of the head, or the gradients with respect to them."""

    norm: Params
    table_VD: Array
    """This stage's rows of the token embedding."""


def embed(params: Params, tokens_BT: Array) -> Array:
    """Token plus position embeddings `[B, T, D]`, the same on all stages.

    In float32, as the parameters are: so many tokens may add to the gradient of one row of the
    table that a sum in a shorter format would stand still.
    """
    table_VD = params["tokens"]
    found_BTD = _own_rows(tokens_BT, table_VD.shape[0], lambda rows: table_VD[rows])
    return found_BTD + params["positions"][: tokens_BT.shape[1]]


def cross_entropy(head: Head, y_BTD: Array, targets_BT: Array, vocab_size: int) -> Array:
    """Negative log-likelihood of this shard's tokens in nats, summed, float32.

    Targets equal to `IGNORE` don't count. `y_BTD`, the output of the last stage, and the result are
    the same on all stages.
    """

    def chunk(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _chunk_loss(head, *inputs, vocab_size), None

    total, _ = lax.scan(chunk, varying(jnp.float32(0), ("data",)), _chunks(y_BTD, targets_BT))
    return total


def cross_entropy_and_grads(
    head: Head, y_BTD: Array, targets_BT: Array, vocab_size: int
) -> tuple[Array, Head, Array]:
    """`cross_entropy` and its gradients with respect to head and `y_BTD`, chunk by chunk.

    Gradients are summed over the stages, except that each has its own rows of the table, and not
    over 'data'.
    """
    head = varying(head)

    def chunk(
        carry: tuple[Array, Head], inputs: tuple[Array, Array]
    ) -> tuple[tuple[Array, Head], Array]:
        total, d_head = carry
        y_LD, targets_L = inputs
        loss = partial(_chunk_loss, targets_L=targets_L, vocab_size=vocab_size)
        value, (d_head_chunk, d_y_LD) = jax.value_and_grad(loss, (0, 1))(head, varying(y_LD))
        return (total + value, jax.tree.map(jnp.add, d_head, d_head_chunk)), d_y_LD

    no_gradients = varying(jax.tree.map(partial(jnp.zeros_like, dtype=jnp.float32), head))
    start = varying(jnp.float32(0), ("data",)), no_gradients
    (total, d_head), d_y = lax.scan(chunk, start, _chunks(y_BTD, targets_BT))
    d_norm = psum(d_head.norm, "pipe")
    d_y = sum_over("pipe", d_y)
    d_y_BTD = d_y.reshape(-1, y_BTD.shape[-1])[: targets_BT.size].reshape(y_BTD.shape)
    return total, Head(d_norm, d_head.table_VD), d_y_BTD


def logits(head: Head, y_LD: Array, vocab_size: int) -> Array:
    """Logits of L tokens over this stage's rows of the vocabulary, `[L, V / P]` float32."""
    num_rows = head.table_VD.shape[0]
    normed_LD = final_norm(head.norm, y_LD).astype(head.table_VD.dtype)
    logits_LV = jnp.einsum(
        "ld,vd->lv", normed_LD, head.table_VD, preferred_element_type=jnp.float32
    )
    is_token_V = lax.axis_index("pipe") * num_rows + jnp.arange(num_rows) < vocab_size
    return jnp.where(is_token_V, logits_LV, MASKED)


def _chunk_loss(head: Head, y_LD: Array, targets_L: Array, vocab_size: int) -> Array:
    logits_LV = logits(head, y_LD, vocab_size)
    top_L = pmax(lax.stop_gradient(logits_LV).max(-1), "pipe")
    total_L = psum(jnp.exp(logits_LV - top_L[:, None]).sum(-1), "pipe")
    num_rows = logits_LV.shape[-1]
    target_L = _own_rows(
        targets_L, num_rows, lambda rows: jnp.take_along_axis(logits_LV, rows[:, None], -1)[:, 0]
    )
    return jnp.where(targets_L != IGNORE, jnp.log(total_L) + top_L - target_L, 0).sum()


def _own_rows(ids: Array, num_rows: int, values: Callable[[Array], Array]) -> Array:
    """`values(row of id)` from the stage whose vocabulary rows hold the id, on all stages."""
    rows = ids - lax.axis_index("pipe") * num_rows
    is_own = (rows >= 0) & (rows < num_rows)
    found = values(jnp.clip(rows, 0, num_rows - 1))
    is_own = is_own.reshape(is_own.shape + (1,) * (found.ndim - is_own.ndim))
    return sum_over("pipe", jnp.where(is_own, found, 0))


def _chunks(y_BTD: Array, targets_BT: Array) -> tuple[Array, Array]:
    """Cuts all tokens into equal chunks; what fills up the last one does not count."""
    chex.assert_equal_shape_prefix([y_BTD, targets_BT], 2)
    num_tokens, D = targets_BT.size, y_BTD.shape[-1]
    num_chunks = -(-num_tokens // CHUNK)
    size = -(-num_tokens // num_chunks)
    fill = num_chunks * size - num_tokens
    y = jnp.pad(y_BTD.reshape(num_tokens, D), ((0, fill), (0, 0)))
    targets = jnp.pad(targets_BT.reshape(num_tokens), (0, fill), constant_values=IGNORE)
    return y.reshape(num_chunks, size, D), targets.reshape(num_chunks, size)
