"""The programs that the profiler times."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Wrapped

from tpipe_jax.config.settings import Config
from tpipe_jax.devices.collectives import psum, varying
from tpipe_jax.devices.precision import compute_dtype
from tpipe_jax.model.block import Params
from tpipe_jax.pipeline.build import (
    empty_gradients_of,
    empty_saved_of,
    for_compute,
    make_stage,
    over_mesh,
)
from tpipe_jax.pipeline.executor import each_alone, sweep
from tpipe_jax.planning.schedule import Item


def make_stage_work(config: Config, mesh: Mesh, items: Sequence[Item]) -> Wrapped:
    """`(params, x [B, T, D], forward table, backward table)` to a number that depends on all work.

    The stages' part of a training step with tables that are run-time values: what the profiler
    times.
    """
    dtype = compute_dtype(config.precision, mesh)
    num_rows = max(item.row + item.num_rows for item in items)

    def local(params: Params, x_BTD: Array, forward: Array, backward: Array) -> Array:
        stage = make_stage(config, mesh, for_compute(config, mesh, params))
        x_BTD = x_BTD.astype(dtype)
        saved = empty_saved_of(config, mesh, num_rows)
        y_BTD, saved = sweep(forward, items, stage.forward, x_BTD, saved)
        d_x_BTD, gradients = sweep(
            backward,
            items,
            partial(stage.backward, saved),
            x_BTD,
            empty_gradients_of(config, mesh, num_rows),
            reverse=True,
        )
        total = sum(
            a.astype(jnp.float32).sum() for a in jax.tree.leaves((y_BTD, d_x_BTD, gradients))
        )
        return psum(jnp.asarray(total), ("data", "pipe"))

    return over_mesh(config, mesh, local, lambda _: PartitionSpec(), num_scalars=2)


def make_weights_work(config: Config, mesh: Mesh, item: Item) -> Wrapped:
    """`(params, x [B, T, D], table [tick, stage, 1])` to a number: the gradients of weights alone
    of the item, whose values are not those of x, but zeros.
    """

    def local(params: Params, x_BTD: Array, table: Array) -> Array:
        stage = make_stage(config, mesh, for_compute(config, mesh, params))
        rows = item.num_rows
        saved, gradients = lax.optimization_barrier(  # lest products with zeros be left out
            varying(
                (
                    empty_saved_of(config, mesh, rows),
                    empty_gradients_of(config, mesh, rows),
                )
            )
        )
        gradients = stage.weight_gradients(partial(each_alone, table, [item]), saved, gradients)
        total = sum(a.sum() for a in jax.tree.leaves([d.params for d in gradients]))
        return psum(jnp.asarray(total), ("data", "pipe"))

    return over_mesh(config, mesh, local, lambda _: PartitionSpec(), num_scalars=1)


def make_transfer(config: Config, mesh: Mesh, item: Item) -> Wrapped:
    """`(params, x [B, T, D], table)` to a number: the ticks of a sweep whose stages do no work."""

    def local(params: Params, x_BTD: Array, table: Array) -> Array:
        x_BTD = jnp.where(lax.axis_index("pipe") == 0, x_BTD, 0)
        x_BTD = x_BTD.astype(compute_dtype(config.precision, mesh))
        y_BTD, _ = sweep(table, [item], lambda chunk, x_BLD, at, state: (x_BLD, state), x_BTD, ())
        return psum(y_BTD.astype(jnp.float32).sum(), ("data", "pipe"))

    return over_mesh(config, mesh, local, lambda _: PartitionSpec(), num_scalars=1)
