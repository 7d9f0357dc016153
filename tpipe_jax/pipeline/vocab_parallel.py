"""Embedding, head and cross-entropy. The vocabulary is sharded, so that all stages share the work.

This is code of one device inside `shard_map`, with the axis 'pipe' manual. Each stage holds V / P
rows of the embedding, and of the head's own table if it has one. GSPMD divides these rows over
'model'. Rows beyond the vocabulary are padding. The method is Megatron-LM's parallel cross-entropy
(Shoeybi et al. 2019, section 3), with all-reduces over 'pipe' only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpipe_jax.attention.base import MASKED
from tpipe_jax.config.settings import IGNORE, ModelConfig
from tpipe_jax.devices.collectives import from_stage, pmax, psum, sum_over_stages, varying
from tpipe_jax.devices.inplace import Position, write
from tpipe_jax.model.block import Params
from tpipe_jax.model.transformer import final_norm

SCALE = 2.0**10  # factor of the gradients of logits: float16 can hold those of unlikely tokens
TILE_TOKENS = 1024  # the most tokens, over all sequences, whose logits are in memory at a time

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


class Head(NamedTuple):
    """Parameters of the head."""

    norm: Params
    table_VD: Array
    """This stage's rows: of the head's own table, or of the token embedding."""


class Sums(NamedTuple):
    """Sums over the parts of a batch, float32. All stages take part in computing them."""

    loss: Array
    """Negative log-likelihood in nats."""
    d_embed: Params
    """Gradients of the embedding. Each stage has its own rows of the token table. The gradients of
    tables are stored divided by weight / SCALE. So a GPU computes each product and adds it to the
    sum in one operation."""
    d_table: Array | None
    """Gradients of the head's own table; None where the head is the token table."""
    d_norm: Params
    """Gradients of the final norm. Each stage has the share that comes from its own logits."""


def no_sums(params: Params) -> Sums:
    """Returns zeroed sums for the parameters of the frame (`transformer`)."""
    zeros = partial(jax.tree.map, partial(jnp.zeros_like, dtype=jnp.float32))
    d_embed = {
        name: varying(zeros(a)) if name == "tokens" else varying(zeros(a), ("data",))
        for name, a in params["embed"].items()
    }
    d_table = varying(zeros(params["head"]["table"])) if "head" in params else None
    loss = varying(jnp.float32(0), ("data",))
    return Sums(loss, d_embed, d_table, varying(zeros(params["norm"])))


def gradients_of(sums: Sums, weight: Array) -> Params:
    """Returns the gradients of the frame's parameters for a loss with this weight, summed over the
    stages where all have a parameter.
    """
    factor = weight / SCALE
    d_embed = sums.d_embed | {"tokens": factor * sums.d_embed["tokens"]}
    d_head = {} if sums.d_table is None else {"head": {"table": factor * sums.d_table}}
    return {"embed": d_embed, "norm": psum(sums.d_norm, "pipe")} | d_head


def embed(params: Params, tokens_BT: Array, dtype: Any, starts_BT1: Array | None = None) -> Array:
    """Returns token embeddings `[B, T, D]`, plus those of positions if there are any. They are the
    same on all stages.

    Positions count from the starts of documents, if these are given. The sum is in float32, the
    format of the parameters, and is then rounded to `dtype`.
    """
    (B, T), table_VD = tokens_BT.shape, params["tokens"]
    num_tokens, tiles = _tiles(B, T)

    def tile(x_BTD: Array, here: _Tile) -> tuple[Array, None]:
        found_BLD = _own_rows(
            _read(tokens_BT, here, num_tokens), len(table_VD), lambda rows: table_VD[rows]
        )
        if "positions" in params:
            if starts_BT1 is None:
                added = lax.dynamic_slice_in_dim(params["positions"], here.token, num_tokens)
            else:
                added = params["positions"][_positions(starts_BT1, here, num_tokens)]
            found_BLD += added
        return write(x_BTD, found_BLD, Position(0, here.token)), None

    empty = varying(jnp.zeros((B, T, table_VD.shape[-1]), dtype), ("data",))
    return lax.scan(tile, empty, tiles)[0]


def add_embed_grads(
    d_params: Params,
    tokens_BT: Array,
    d_x_BTD: Array,
    weight: Array,
    starts_BT1: Array | None = None,
) -> Params:
    """Adds the gradients with respect to the parameters of `embed` to `d_params` (`Sums.d_embed`).

    `d_x_BTD` is the gradient with respect to the result of `embed`; it is read on the first stage
    only. The sums are float32: many tokens may add to one row, and a sum in a shorter format would
    stop growing.
    """
    num_rows = len(d_params["tokens"])
    num_tokens, tiles = _tiles(*tokens_BT.shape)

    def tile(d_params: Params, here: _Tile) -> tuple[Params, None]:
        d_x_BLD = from_stage(0, _read(d_x_BTD, here, num_tokens)).astype(jnp.float32)
        d_x_BLD = jnp.where(here.is_new_L[:, None], d_x_BLD, 0)
        rows_BL, is_own_BL = _find_rows(_read(tokens_BT, here, num_tokens), num_rows)
        d_own_BLD = jnp.where(is_own_BL[..., None], SCALE / weight * d_x_BLD, 0)
        sums = {"tokens": d_params["tokens"].at[rows_BL].add(d_own_BLD)}
        if "positions" in d_params:
            d_positions = d_params["positions"]
            if starts_BT1 is None:
                before_LD = lax.dynamic_slice_in_dim(d_positions, here.token, num_tokens)
                sums["positions"] = lax.dynamic_update_slice_in_dim(
                    d_positions, before_LD + d_x_BLD.sum(0), here.token, 0
                )
            else:
                where_BL = _positions(starts_BT1, here, num_tokens)
                sums["positions"] = d_positions.at[where_BL].add(d_x_BLD)
        return sums, None

    return lax.scan(tile, d_params, tiles)[0]


def cross_entropy(model: ModelConfig, head: Head, y_BTD: Array, targets_BT: Array) -> Array:
    """Returns the negative log-likelihood of this data shard's tokens in nats, summed, float32, on
    all stages.

    `y_BTD` is read on the last stage only. Targets equal to `IGNORE` don't count.
    """
    num_tokens, tiles = _tiles(*targets_BT.shape)

    def tile(total: Array, here: _Tile) -> tuple[Array, None]:
        y_BLD = from_stage(-1, _read(y_BTD, here, num_tokens))
        value = _tile_loss(logits(model, head, y_BLD), _targets(targets_BT, here))
        return total + value, None

    return lax.scan(tile, varying(jnp.float32(0), ("data",)), tiles)[0]


def add_cross_entropy_and_grads(
    model: ModelConfig, sums: Sums, head: Head, y_BTD: Array, targets_BT: Array, weight: Array
) -> tuple[Sums, Array]:
    """Adds `cross_entropy` to the sums, and the gradients of `weight` times `cross_entropy` with
    respect to the head.

    Also returns the gradients with respect to `y_BTD`, on all stages. Tile by tile, they overwrite
    `y_BTD`, so that no second buffer of its size is needed. Nothing is summed over 'data'.
    """
    head, dtype = varying(head), head.table_VD.dtype
    num_tokens, tiles = _tiles(*targets_BT.shape)

    def tile(carry: tuple[Array, Array, Params, Array], here: _Tile):
        total, d_table_VD, d_norm, buffer_BTD = carry
        here_BLD = _read(buffer_BTD, here, num_tokens)
        targets_BL = _targets(targets_BT, here)

        y_BLD = varying(from_stage(-1, here_BLD))
        normed_BLD, norm_vjp = jax.vjp(partial(final_norm, model), head.norm, y_BLD)
        normed_BLD = normed_BLD.astype(dtype)
        value, d_logits_BLV = _tile_loss_and_grads(
            _logits(model, head.table_VD, normed_BLD), targets_BL, dtype
        )
        more_VD = _dot("blv,bld->vd", d_logits_BLV, normed_BLD)
        d_normed_BLD = _dot("blv,vd->bld", d_logits_BLV, head.table_VD)
        more_of_norm, d_y_BLD = norm_vjp(weight / SCALE * d_normed_BLD)
        # The buffer already holds gradients for tokens that were in the previous tile as well.
        d_y_BLD = jnp.where(here.is_new_L[:, None], sum_over_stages(d_y_BLD), here_BLD)
        return (
            total + value,
            d_table_VD + more_VD,
            jax.tree.map(jnp.add, d_norm, more_of_norm),
            write(buffer_BTD, d_y_BLD, Position(0, here.token)),
        ), None

    d_own = sums.d_table
    d_table_VD = sums.d_embed["tokens"] if d_own is None else d_own
    start = sums.loss, d_table_VD, sums.d_norm, varying(y_BTD)
    (total, d_table_VD, d_norm, d_y_BTD), _ = lax.scan(tile, start, tiles)
    if d_own is None:
        return Sums(total, sums.d_embed | {"tokens": d_table_VD}, None, d_norm), d_y_BTD
    return Sums(total, sums.d_embed, d_table_VD, d_norm), d_y_BTD


def logits(model: ModelConfig, head: Head, y: Array) -> Array:
    """Returns the logits of tokens `y` `[..., D]` over this stage's rows of the vocabulary,
    `[..., V / P]` float32.

    `y` is the same on all stages.
    """
    normed = final_norm(model, head.norm, y).astype(head.table_VD.dtype)
    return _logits(model, head.table_VD, normed)


def _logits(model: ModelConfig, table_VD: Array, normed: Array) -> Array:
    num_rows = len(table_VD)
    logits = _dot("...d,vd->...v", normed, table_VD)
    is_token_V = lax.axis_index("pipe") * num_rows + jnp.arange(num_rows) < model.vocab_size
    return jnp.where(is_token_V, logits, MASKED)


def _tile_loss(logits_BLV: Array, targets_BL: Array) -> Array:
    return _loss_of(*_top_and_total(logits_BLV), logits_BLV, targets_BL)


def _tile_loss_and_grads(logits_BLV: Array, targets_BL: Array, dtype: Any) -> tuple[Array, Array]:
    """Returns the loss, and the gradients of `SCALE` times the loss with respect to the logits.

    The gradients are in `dtype`, the format of matrix products.
    """
    top_BL, total_BL = _top_and_total(logits_BLV)
    rows_BL, is_own_BL = _find_rows(targets_BL, logits_BLV.shape[-1])
    is_target_BLV = (jnp.arange(logits_BLV.shape[-1]) == rows_BL[..., None]) & is_own_BL[..., None]
    # A division, since exp(logit - log-sum-exp) would not sum to exactly 1.
    softmax_BLV = jnp.exp(logits_BLV - top_BL[..., None]) / total_BL[..., None]
    d_logits_BLV = softmax_BLV - is_target_BLV
    d_logits_BLV = jnp.where(targets_BL[..., None] != IGNORE, SCALE * d_logits_BLV, 0)
    return _loss_of(top_BL, total_BL, logits_BLV, targets_BL), d_logits_BLV.astype(dtype)


def _top_and_total(logits_BLV: Array) -> tuple[Array, Array]:
    """Returns for each token the largest logit over all stages, `top`, and the sum of
    exp(logit - top) over all stages.
    """
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
    """Returns `values(row of id)` on all stages, computed by the stage that holds the id's row."""
    rows, is_own = _find_rows(ids, num_rows)
    found = values(rows)
    is_own = is_own.reshape(is_own.shape + (1,) * (found.ndim - is_own.ndim))
    return sum_over_stages(jnp.where(is_own, found, 0))


def _find_rows(ids: Array, num_rows: int) -> tuple[Array, Array]:
    """Returns the row of each id on this stage, and whether this stage has that row."""
    rows = ids - lax.axis_index("pipe") * num_rows
    return jnp.clip(rows, 0, num_rows - 1), (rows >= 0) & (rows < num_rows)


class _Tile(NamedTuple):
    """Some tokens of all sequences."""

    token: Array
    """Index of the first token."""
    is_new_L: Array
    """False for tokens that were in the previous tile as well."""


def tile_tokens(batch_size: int, seq_len: int) -> int:
    """Tokens of each sequence whose logits are in memory at a time."""
    num_tiles = -(-seq_len // min(max(1, TILE_TOKENS // batch_size), seq_len))
    return -(-seq_len // num_tiles)


def _tiles(batch_size: int, seq_len: int) -> tuple[int, _Tile]:
    """Returns the number of tokens of each tile, and all tiles, stacked. The last tile overlaps the
    one before it if tiles don't divide the sequence.
    """
    num_tokens = tile_tokens(batch_size, seq_len)
    due = np.arange(0, seq_len, num_tokens)
    first = np.minimum(due, seq_len - num_tokens)
    is_new = first[:, None] + np.arange(num_tokens) >= due[:, None]
    return num_tokens, _Tile(jnp.asarray(first), jnp.asarray(is_new))


def _read(buffer: Array, tile: _Tile, num_tokens: int) -> Array:
    """Returns the tile's part of a buffer `[B, T]` or `[B, T, D]`."""
    return lax.dynamic_slice_in_dim(buffer, tile.token, num_tokens, 1)


def _positions(starts_BT1: Array, tile: _Tile, num_tokens: int) -> Array:
    """Positions of the tile's tokens in their documents, `[B, L]`."""
    return tile.token + jnp.arange(num_tokens) - _read(starts_BT1, tile, num_tokens)[..., 0]


def _targets(targets_BT: Array, tile: _Tile) -> Array:
    """Returns the tile's targets; `IGNORE` for tokens that the previous tile has counted."""
    targets_BL = _read(targets_BT, tile, tile.is_new_L.size)
    return jnp.where(tile.is_new_L, targets_BL, IGNORE)
