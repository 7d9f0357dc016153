"""Makes the stage of a device from its spec: layers, buffers, and programs over all devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.stages import Wrapped

from tpipe_jax.attention.base import KVCache
from tpipe_jax.devices.collectives import needs_sums, varying
from tpipe_jax.devices.mesh import manual_part
from tpipe_jax.model.block import Params
from tpipe_jax.model.functional import block_functions, param_shapes, value_widths
from tpipe_jax.model.registry import block_class
from tpipe_jax.model.sharding import param_specs
from tpipe_jax.pipeline import vocab_parallel
from tpipe_jax.pipeline.buffers import (
    Gradients,
    Saved,
    empty_caches,
    empty_gradients,
    empty_saved,
)
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.pipeline.stage import Chunk, Stage
from tpipe_jax.planning.placement import chunk_places


def for_compute(spec: StageSpec, params: Params) -> Params:
    """Returns the parameters of this device, with the matrices of blocks in the format of matrix
    products.

    The parameters are marked as different on each data shard. So gradients are summed over the data
    shards once, at the end of the step, and not after each product.
    """

    def own(a: Array) -> Array:
        return a[0].astype(spec.dtype) if a.ndim > 2 else a[0]  # the first axis is 'pipe'

    blocks = [jax.tree.map(own, block) for block in params["blocks"]]
    return varying(params | {"blocks": blocks}, ("data",))


def make_head(spec: StageSpec, params: Params) -> vocab_parallel.Head:
    """Makes the head from the parameters of this device."""
    return vocab_parallel.Head(params["norm"], params["embed"]["tokens"].astype(spec.dtype))


def make_stage(spec: StageSpec, params: Params, starts_BT1: Array | None = None) -> Stage:
    """Makes the layers of the stage from the parameters of this device."""
    places = chunk_places(spec.chunk_layers)
    return Stage(
        block_functions(spec.config.model, spec.dtype),
        spec.attention,
        params["blocks"],
        tuple(
            Chunk(own, jnp.array(counts)[lax.axis_index("pipe")], min(counts))
            for own, counts in zip(places, spec.chunk_layers, strict=True)
        ),
        starts_BT1,
        skips=spec.skips,
    )


def cache_shape(spec: StageSpec, num_rows: int) -> tuple[int, int, int, int]:
    """The shape `[B, H, T, K]` of the keys of one layer for `num_rows` sequences."""
    return num_rows, spec.heads.num_keys, spec.config.model.seq_len, spec.heads.width


def caches_of(spec: StageSpec, dtype: Any, num_rows: int) -> list[KVCache]:
    """Returns zeroed caches of this device for `num_rows` sequences."""
    return empty_caches(spec.layers_per_stage, cache_shape(spec, num_rows), dtype)


def saved_of(spec: StageSpec, num_rows: int) -> list[Saved]:
    """Returns zeroed buffers of this device for the forward passes of `num_rows` sequences."""
    return empty_saved(
        caches_of(spec, spec.dtype, num_rows),
        {"x": spec.config.model.d_model} | value_widths(spec.config.model),
        spec.heads.num_queries,
        spec.saved_names,
    )


def gradients_of(
    spec: StageSpec, num_rows: int, outputs: tuple[int, int] | None = None
) -> list[Gradients]:
    """Returns zeroed buffers of this device for the backward passes of `num_rows` sequences at a
    time.

    `outputs` are the rows and tokens of the buffers for gradients with respect to the outputs of
    linear layers; None means `num_rows` and the sequence length.
    """
    model = spec.config.model
    return empty_gradients(
        caches_of(spec, jnp.float32, num_rows),
        param_shapes(model),
        block_class(model).linears,
        spec.weight_grads,
        outputs or (num_rows, model.seq_len),
        spec.dtype,
    )


def over_mesh(
    spec: StageSpec,
    local: Callable[..., Any],
    out_specs: Callable[[Any], Any],
    num_scalars: int = 0,
) -> Wrapped:
    """Makes a compiled program over all devices from code of one device. The axes 'data' and 'pipe'
    are manual; 'model' is left to GSPMD.

    The arguments of `local` are the parameters, rows of the batch, and `num_scalars` values that
    are the same on all devices. `out_specs` makes the specs of the results from the specs of the
    parameters.
    """
    specs = manual_part(param_specs(spec.config.model, spec.layers_per_stage))
    in_specs = specs, PartitionSpec("data"), *(PartitionSpec(),) * num_scalars
    mapped = jax.shard_map(
        local,
        mesh=spec.mesh,
        axis_names={"data", "pipe"},
        in_specs=in_specs,
        out_specs=out_specs(specs),
        check_vma=needs_sums(spec.mesh),
    )
    return jax.jit(mapped)
