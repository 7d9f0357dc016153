"""Embedding, head and cross-entropy, with the vocabulary sharded so that all stages share them.

Code of one device inside `shard_map`, with the axis 'pipe' manual; each stage holds V / P rows of
the tied embedding (and GSPMD divides those over 'model'). Rows beyond the vocabulary are padding.
As Megatron-LM's parallel cross-entropy (Shoeybi et al. 2019, section 3), with all-reduces over
'pipe' only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpipe_jax.attention.base import MASKED
from tpipe_jax.config.settings import IGNORE
from tpipe_jax.devices.collectives import from_stage, pmax, psum, sum_over, varying
from tpipe_jax.devices.inplace import Position, write
from tpipe_jax.model.block import Params
from tpipe_jax.model.transformer import final_norm

SCALE = 2.0**10  # of gradients of logits, so that float16 holds those of unlikely tokens
TILE_TOKENS = 1024  # tokens of all sequences whose logits are in memory at a time, at most

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


class Head(NamedTuple):
    """Parameters of the head."""

    norm: Params
    table_VD: Array
    """This stage's rows of the token embedding."""


class Sums(NamedTuple):
    """What parts of a batch add up to, for which all stages meet; float32."""

    loss: Array
    """Negative log-likelihood in nats."""
    d_embed: Params
    """Gradients of the embedding. Each stage has its own rows of the table, which the head has too,
    in units of weight / SCALE, with which a GPU adds up products as it computes them."""
    d_norm: Params
    """Gradients of the final norm, of which each stage has those of its own logits."""


def no_sums(embed: Params, norm: Params) -> Sums:
    """Zeros, for these parameters."""
    zeros = partial(jax.tree.map, partial(jnp.zeros_like, dtype=jnp.float32))
    d_embed = {
        "tokens": varying(zeros(embed["tokens"])),
        "positions": varying(zeros(embed["positions"]), ("data",)),
    }
    return Sums(varying(jnp.float32(0), ("data",)), d_embed, varying(zeros(norm)))


def embed_gradients(sums: Sums, weight: Array) -> Params:
    """Those of the embedding, and of the head's table, where the loss has this weight."""
    return sums.d_embed | {"tokens": weight / SCALE * sums.d_embed["tokens"]}


def embed(params: Params, tokens_BT: Array, dtype: Any, starts_BT1: Array | None = None) -> Array:
    """Token plus position embeddings `[B, T, D]`, the same on all stages; positions are counted
    from the starts of documents, if these are given.

    Summed in float32, as the parameters are, and rounded to `dtype`.
    """
    (B, T), table_VD = tokens_BT.shape, params["tokens"]
    num_tokens, tiles = _tiles(B, T)

    def tile(x_BTD: Array, here: _Tile) -> tuple[Array, None]:
        found_BLD = _own_rows(
            _read(tokens_BT, here, num_tokens), len(table_VD), lambda rows: table_VD[rows]
        )
        if starts_BT1 is None:
            added = lax.dynamic_slice_in_dim(params["positions"], here.token, num_tokens)
        else:
            added = params["positions"][_positions(starts_BT1, here, num_tokens)]
        return write(x_BTD, found_BLD + added, Position(0, here.token)), None

    empty = varying(jnp.zeros((B, T, table_VD.shape[-1]), dtype), ("data",))
    return lax.scan(tile, empty, tiles)[0]


def add_embed_grads(
    d_params: Params,
    tokens_BT: Array,
    d_x_BTD: Array,
    weight: Array,
    starts_BT1: Array | None = None,
) -> Params:
    """Adds the gradients of `embed` with respect to the parameters to `Sums.d_embed`, from those of
    the first stage with respect to its result.

    So many tokens may add to one row that a sum in a shorter format would stand still.
    """
    num_rows = len(d_params["tokens"])
    num_tokens, tiles = _tiles(*tokens_BT.shape)

    def tile(d_params: Params, here: _Tile) -> tuple[Params, None]:
        d_x_BLD = from_stage(0, _read(d_x_BTD, here, num_tokens)).astype(jnp.float32)
        d_x_BLD = jnp.where(here.is_new_L[:, None], d_x_BLD, 0)
        rows_BL, is_own_BL = _find_rows(_read(tokens_BT, here, num_tokens), num_rows)
        d_own_BLD = jnp.where(is_own_BL[..., None], SCALE / weight * d_x_BLD, 0)
        d_positions = d_params["positions"]
        if starts_BT1 is None:
            before_LD = lax.dynamic_slice_in_dim(d_positions, here.token, num_tokens)
            d_positions = lax.dynamic_update_slice_in_dim(
                d_positions, before_LD + d_x_BLD.sum(0), here.token, 0
            )
        else:
            where_BL = _positions(starts_BT1, here, num_tokens)
            d_positions = d_positions.at[where_BL].add(d_x_BLD)
        d_tokens = d_params["tokens"].at[rows_BL].add(d_own_BLD)
        return {"tokens": d_tokens, "positions": d_positions}, None

    return lax.scan(tile, d_params, tiles)[0]


def cross_entropy(head: Head, y_BTD: Array, targets_BT: Array, vocab_size: int) -> Array:
    """Negative log-likelihood of this shard's tokens in nats, summed, float32, on all stages.

    `y_BTD` is read on the last stage only. Targets equal to `IGNORE` don't count.
    """
    num_tokens, tiles = _tiles(*targets_BT.shape)

    def tile(total: Array, here: _Tile) -> tuple[Array, None]:
        y_BLD = from_stage(-1, _read(y_BTD, here, num_tokens))
        value = _tile_loss(logits(head, y_BLD, vocab_size), _targets(targets_BT, here))
        return total + value, None

    return lax.scan(tile, varying(jnp.float32(0), ("data",)), tiles)[0]


def add_cross_entropy_and_grads(
    sums: Sums, head: Head, y_BTD: Array, targets_BT: Array, vocab_size: int, weight: Array
) -> tuple[Sums, Array]:
    """Adds `cross_entropy`, and the gradients of `weight` times it with respect to the head, to the
    sums.

    Returns those with respect to `y_BTD` too, on all stages. They take its place, tile by tile,
    so that there is no second buffer of its size. Nothing is summed over 'data'.
    """
    head, dtype = varying(head), head.table_VD.dtype
    num_tokens, tiles = _tiles(*targets_BT.shape)

    def tile(carry: tuple[Array, Array, Params, Array], here: _Tile):
        total, d_table_VD, d_norm, buffer_BTD = carry
        here_BLD = _read(buffer_BTD, here, num_tokens)
        targets_BL = _targets(targets_BT, here)

        y_BLD = varying(from_stage(-1, here_BLD))
        normed_BLD, norm_vjp = jax.vjp(final_norm, head.norm, y_BLD)
        normed_BLD = normed_BLD.astype(dtype)
        value, d_logits_BLV = _tile_loss_and_grads(
            _logits(head.table_VD, normed_BLD, vocab_size), targets_BL, dtype
        )
        more_VD = _dot("blv,bld->vd", d_logits_BLV, normed_BLD)
        d_normed_BLD = _dot("blv,vd->bld", d_logits_BLV, head.table_VD)
        more_of_norm, d_y_BLD = norm_vjp(weight / SCALE * d_normed_BLD)
        # Tokens that were in the tile before as well have their gradients already.
        d_y_BLD = jnp.where(here.is_new_L[:, None], sum_over("pipe", d_y_BLD), here_BLD)
        return (
            total + value,
            d_table_VD + more_VD,
            jax.tree.map(jnp.add, d_norm, more_of_norm),
            write(buffer_BTD, d_y_BLD, Position(0, here.token)),
        ), None

    start = sums.loss, sums.d_embed["tokens"], sums.d_norm, varying(y_BTD)
    (total, d_table_VD, d_norm, d_y_BTD), _ = lax.scan(tile, start, tiles)
    return Sums(total, sums.d_embed | {"tokens": d_table_VD}, d_norm), d_y_BTD


def logits(head: Head, y: Array, vocab_size: int) -> Array:
    """Logits of tokens `[..., D]` over this stage's rows of the vocabulary, `[..., V / P]` float32.

    `y` is the same on all stages.
    """
    normed = final_norm(head.norm, y).astype(head.table_VD.dtype)
    return _logits(head.table_VD, normed, vocab_size)


def _logits(table_VD: Array, normed: Array, vocab_size: int) -> Array:
    num_rows = len(table_VD)
    logits = _dot("...d,vd->...v", normed, table_VD)
    is_token_V = lax.axis_index("pipe") * num_rows + jnp.arange(num_rows) < vocab_size
    return jnp.where(is_token_V, logits, MASKED)


def _tile_loss(logits_BLV: Array, targets_BL: Array) -> Array:
    return _loss_of(*_top_and_total(logits_BLV), logits_BLV, targets_BL)


def _tile_loss_and_grads(logits_BLV: Array, targets_BL: Array, dtype: Any) -> tuple[Array, Array]:
    """The loss, and the gradients of `SCALE` times it with respect to the logits, in a format for
    products.
    """
    top_BL, total_BL = _top_and_total(logits_BLV)
    rows_BL, is_own_BL = _find_rows(targets_BL, logits_BLV.shape[-1])
    is_target_BLV = (jnp.arange(logits_BLV.shape[-1]) == rows_BL[..., None]) & is_own_BL[..., None]
    # Divided, since the exponential of a difference to the log-sum-exp would not sum to 1.
    softmax_BLV = jnp.exp(logits_BLV - top_BL[..., None]) / total_BL[..., None]
    d_logits_BLV = softmax_BLV - is_target_BLV
    d_logits_BLV = jnp.where(targets_BL[..., None] != IGNORE, SCALE * d_logits_BLV, 0)
    return _loss_of(top_BL, total_BL, logits_BLV, targets_BL), d_logits_BLV.astype(dtype)


def _top_and_total(logits_BLV: Array) -> tuple[Array, Array]:
    """The largest logit of all stages, and the sum of all exponentials relative to it."""
    top_BL = pmax(logits_BLV.max(-1), "pipe")
    return top_BL, psum(jnp.exp(logits_BLV - top_BL[..., None]).sum(-1), "pipe")


def _loss_of(top_BL: Array, total_BL: Array, logits_BLV: Array, targets_BL: Array) -> Array:
    target_BL = _own_rows(
        targets_BL,
        logits_BLV.shape[-1],
        lambda rows: jnp.take_along_axis(logits_BLV, rows[..., None], -1)[..., 0],
    )
    return jnp.where(targets_BL != IGNORE, jnp.log(total_BL) + top_BL - target_BL, 0).sum()


def _own_rows(ids: Array, num_rows: int, values: Callable[[Array], Array]) -> Array:
    """`values(row of id)` from the stage whose vocabulary rows hold the id, on all stages."""
    rows, is_own = _find_rows(ids, num_rows)
    found = values(rows)
    is_own = is_own.reshape(is_own.shape + (1,) * (found.ndim - is_own.ndim))
    return sum_over("pipe", jnp.where(is_own, found, 0))


def _find_rows(ids: Array, num_rows: int) -> tuple[Array, Array]:
    """Rows of this stage that hold the ids, and where there is one."""
    rows = ids - lax.axis_index("pipe") * num_rows
    return jnp.clip(rows, 0, num_rows - 1), (rows >= 0) & (rows < num_rows)


class _Tile(NamedTuple):
    """Some tokens of all sequences."""

    token: Array
    """The first of them."""
    is_new_L: Array
    """False for those that were in the tile before."""


def tile_tokens(batch_size: int, seq_len: int) -> int:
    """Tokens of each sequence whose logits are in memory at a time."""
    num_tiles = -(-seq_len // min(max(1, TILE_TOKENS // batch_size), seq_len))
    return -(-seq_len // num_tiles)


def _tiles(batch_size: int, seq_len: int) -> tuple[int, _Tile]:
    """Tokens of each tile, and all tiles, stacked; the last overlaps where they don't divide."""
    num_tokens = tile_tokens(batch_size, seq_len)
    due = np.arange(0, seq_len, num_tokens)
    first = np.minimum(due, seq_len - num_tokens)
    is_new = first[:, None] + np.arange(num_tokens) >= due[:, None]
    return num_tokens, _Tile(jnp.asarray(first), jnp.asarray(is_new))


def _read(buffer: Array, tile: _Tile, num_tokens: int) -> Array:
    """The tile's part of a `[B, T]` or `[B, T, D]`."""
    return lax.dynamic_slice_in_dim(buffer, tile.token, num_tokens, 1)


def _positions(starts_BT1: Array, tile: _Tile, num_tokens: int) -> Array:
    """Of the tile's tokens in their documents, `[B, L]`."""
    return tile.token + jnp.arange(num_tokens) - _read(starts_BT1, tile, num_tokens)[..., 0]


def _targets(targets_BT: Array, tile: _Tile) -> Array:
    """The tile's targets; those that were in the tile before don't count again."""
    targets_BL = _read(targets_BT, tile, tile.is_new_L.size)
    return jnp.where(tile.is_new_L, targets_BL, IGNORE)
