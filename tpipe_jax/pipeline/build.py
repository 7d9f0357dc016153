"""The stage of a device as config and mesh have it: its layers, its buffers, and what they take."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Wrapped

from tpipe_jax.attention.backends import make_attention
from tpipe_jax.attention.base import KVCache
from tpipe_jax.config.settings import Config
from tpipe_jax.devices.collectives import needs_sums, varying
from tpipe_jax.devices.mesh import manual_part
from tpipe_jax.devices.precision import compute_dtype
from tpipe_jax.model.block import Params
from tpipe_jax.model.functional import block_functions, heads, param_shapes, value_widths
from tpipe_jax.model.registry import block_class
from tpipe_jax.model.remat import saved_names
from tpipe_jax.model.sharding import param_specs
from tpipe_jax.pipeline import vocab_parallel
from tpipe_jax.pipeline.buffers import (
    Deferral,
    Gradients,
    Saved,
    empty_caches,
    empty_gradients,
    empty_saved,
)
from tpipe_jax.pipeline.stage import Chunk, Stage
from tpipe_jax.planning.placement import chunk_counts, chunk_slots, layer_counts


def for_compute(config: Config, mesh: Mesh, params: Params) -> Params:
    """Parameters of this device, with the matrices of blocks in the format of matrix products.

    They are marked as different on the data shards, so that gradients are summed over those once,
    at the end, and not where they arise.
    """
    dtype = compute_dtype(config.precision, mesh)

    def own(a: Array) -> Array:
        return a[0].astype(dtype) if a.ndim > 2 else a[0]  # the first axis is that of the stages

    blocks = [jax.tree.map(own, block) for block in params["blocks"]]
    return varying(params | {"blocks": blocks}, ("data",))


def make_head(config: Config, mesh: Mesh, params: Params) -> vocab_parallel.Head:
    """The head, from parameters of this device."""
    table_VD = params["embed"]["tokens"].astype(compute_dtype(config.precision, mesh))
    return vocab_parallel.Head(params["norm"], table_VD)


def make_stage(
    config: Config, mesh: Mesh, params: Params, starts_BT1: Array | None = None
) -> Stage:
    """The layers, from parameters of this device."""
    num_stages = lax.axis_size("pipe")
    counts = chunk_counts(config.model.num_layers, num_stages, config.plan.num_chunks)
    block = block_functions(config.model, compute_dtype(config.precision, mesh))
    return Stage(
        block,
        make_attention(config, mesh, heads(config.model)),
        params["blocks"],
        tuple(
            Chunk(slots, jnp.array(own)[lax.axis_index("pipe")], min(own))
            for slots, own in zip(chunk_slots(counts), counts, strict=True)
        ),
        starts_BT1,
    )


def empty_saved_of(config: Config, mesh: Mesh, num_rows: int) -> list[Saved]:
    """What the forward passes of so many sequences fill on this device."""
    return empty_saved(
        empty_caches_of(config, mesh, compute_dtype(config.precision, mesh), num_rows),
        {"x": config.model.d_model} | value_widths(config.model),
        heads(config.model).num_queries,
        saved_names(config.memory.remat),
    )


def empty_caches_of(config: Config, mesh: Mesh, dtype: Any, num_rows: int) -> list[KVCache]:
    """Caches for so many sequences on this device."""
    shape = cache_shape(config, num_rows)
    return empty_caches(layers_per_stage(config, mesh), shape, dtype)


def empty_gradients_of(
    config: Config, mesh: Mesh, num_rows: int, outputs: tuple[int, int] | None = None
) -> list[Gradients]:
    """What the backward passes of so many sequences at a time fill on this device; rows and tokens
    for what linear layers give back are those of the sequences, unless there are others.
    """
    return empty_gradients(
        empty_caches_of(config, mesh, jnp.float32, num_rows),
        param_shapes(config.model),
        block_class(config.model).linears,
        deferral(config),
        outputs or (num_rows, config.model.seq_len),
        compute_dtype(config.precision, mesh),
    )


def deferral(config: Config) -> Deferral:
    """What is done about gradients of weights."""
    if config.plan.schedule == "1f1b-deferred":
        return "some ticks"
    return "to the end" if config.memory.defer_weight_grads else "none"


def layers_per_stage(config: Config, mesh: Mesh) -> int:
    """Of the stage that has most."""
    return max(layer_counts(config.model.num_layers, mesh.shape["pipe"]))


def cache_shape(config: Config, num_rows: int) -> tuple[int, int, int, int]:
    """Of the keys of a layer for so many sequences, `[B, H, T, K]`."""
    _, num_keys, width = heads(config.model)
    return num_rows, num_keys, config.model.seq_len, width


def over_mesh(
    config: Config,
    mesh: Mesh,
    local: Callable[..., Any],
    out_specs: Callable[[Any], Any],
    num_scalars: int = 0,
) -> Wrapped:
    """Compiles code of one device, with 'data' and 'pipe' manual and 'model' left to GSPMD."""
    specs = manual_part(param_specs(config.model, layers_per_stage(config, mesh)))
    in_specs = specs, PartitionSpec("data"), *(PartitionSpec(),) * num_scalars
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        axis_names={"data", "pipe"},
        in_specs=in_specs,
        out_specs=out_specs(specs),
        check_vma=needs_sums(mesh),
    )
    return jax.jit(mapped)
