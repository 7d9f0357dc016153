"""The programs that the profiler times."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.stages import Wrapped

from tpipe_jax.devices.collectives import psum, varying
from tpipe_jax.devices.scopes import BACKWARD, FORWARD
from tpipe_jax.model.block import Params
from tpipe_jax.pipeline.build import (
    for_compute,
    gradients_of,
    make_stage,
    over_mesh,
    packing_of,
    saved_of,
)
from tpipe_jax.pipeline.executor import each_alone, sweep
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.schedule import Item


def make_stage_work(spec: StageSpec, items: Sequence[Item]) -> Wrapped:
    """Makes the program that runs the stages alone, their part of a training step:
    `(params, x [B, T, D], forward table, backward table)` to a number.

    The number depends on all results, so XLA leaves nothing out. The tables are run-time values.
    """
    num_rows = max(item.row + item.num_rows for item in items)
    packing = packing_of(spec, max(item.num_tokens for item in items))

    def local(params: Params, x_BTD: Array, forward: Array, backward: Array) -> Array:
        stage = make_stage(spec, for_compute(spec, params), packing)
        x_BTD = x_BTD.astype(spec.dtype)
        saved = saved_of(spec, packing, num_rows)
        with jax.named_scope(FORWARD):
            y_BTD, saved = sweep(forward, items, stage.forward, x_BTD, saved, skips=spec.skips)
        with jax.named_scope(BACKWARD):
            d_x_BTD, gradients = sweep(
                backward,
                items,
                partial(stage.backward, saved),
                x_BTD,
                gradients_of(spec, num_rows),
                reverse=True,
                skips=spec.skips,
            )
        total = sum(a.astype(jnp.float32).sum() for a in (y_BTD, d_x_BTD))
        return psum(total + _first(gradients), ("data", "pipe"))

    return over_mesh(spec, local, lambda _: PartitionSpec(), num_scalars=2)


def make_weights_work(spec: StageSpec, item: Item) -> Wrapped:
    """Returns the program `(params, x [B, T, D], table [tick, stage, 1])` to a number.

    It takes only the gradients of weights of the item. The item's saved values may be anything, and
    x is not read.
    """
    packing = packing_of(spec, item.num_tokens)

    def local(params: Params, x_BTD: Array, table: Array) -> Array:
        stage = make_stage(spec, for_compute(spec, params), packing)
        rows = item.num_rows
        saved, gradients = lax.optimization_barrier(  # so that XLA keeps the products
            varying(
                (
                    saved_of(spec, packing, rows),
                    gradients_of(spec, rows),
                )
            )
        )
        gradients = stage.weight_gradients(
            partial(each_alone, table, [item], skips=spec.skips), saved, gradients
        )
        return psum(_first([d.params for d in gradients]), ("data", "pipe"))

    return over_mesh(spec, local, lambda _: PartitionSpec(), num_scalars=1)


def make_transfer(spec: StageSpec, item: Item) -> Wrapped:
    """Returns the program `(params, x [B, T, D], table)` to a number: a sweep whose stages do no
    work, and only hand on their packets.
    """

    def local(params: Params, x_BTD: Array, table: Array) -> Array:
        x_BTD = jnp.where(lax.axis_index("pipe") == 0, x_BTD, 0)
        x_BTD = x_BTD.astype(spec.dtype)
        y_BTD, _ = sweep(
            table,
            [item],
            lambda chunk, x_BLD, at, state: (x_BLD, state),
            x_BTD,
            (),
            skips=spec.skips,
        )
        return psum(y_BTD.astype(jnp.float32).sum(), ("data", "pipe"))

    return over_mesh(spec, local, lambda _: PartitionSpec(), num_scalars=1)


def _first(arrays: Any) -> Array:
    """Returns the sum of the first elements of all arrays in a tree."""
    first = [a[(0,) * a.ndim].astype(jnp.float32) for a in jax.tree.leaves(arrays)]
    return sum(first[1:], first[0])
