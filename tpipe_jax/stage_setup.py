"""The stage of a device as config and mesh have it: its layers, its buffers, and what they take."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from tpipe_jax import loss
from tpipe_jax.attention import KVCache
from tpipe_jax.backends import make_attention
from tpipe_jax.block import Params
from tpipe_jax.config import Config
from tpipe_jax.layer import block_class, block_functions, heads, param_shapes, value_widths
from tpipe_jax.mesh import layer_counts
from tpipe_jax.pipeline import varying
from tpipe_jax.precision import compute_dtype
from tpipe_jax.remat import saved_names
from tpipe_jax.stage import (
    UNDIVIDED,
    Gradients,
    Saved,
    Stage,
    empty_caches,
    empty_gradients,
    empty_saved,
)


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


def make_head(config: Config, mesh: Mesh, params: Params) -> loss.Head:
    """The head, from parameters of this device."""
    table_VD = params["embed"]["tokens"].astype(compute_dtype(config.precision, mesh))
    return loss.Head(params["norm"], table_VD)


def make_stage(
    config: Config, mesh: Mesh, params: Params, starts_BT1: Array | None = None
) -> Stage:
    """The layers, from parameters of this device."""
    counts = layer_counts(config.model.num_layers, lax.axis_size("pipe"))
    block = block_functions(config.model, compute_dtype(config.precision, mesh))
    return Stage(
        block,
        make_attention(config, mesh),
        params["blocks"],
        jnp.array(counts)[lax.axis_index("pipe")],
        min(counts),
        starts_BT1,
    )


def empty_saved_of(config: Config, mesh: Mesh) -> list[Saved]:
    """What the forward pass of this device's batch fills."""
    return empty_saved(
        empty_caches_of(config, mesh, compute_dtype(config.precision, mesh)),
        {"x": config.model.d_model} | value_widths(config.model),
        heads(config.model).num_queries,
        saved_names(config.memory.remat),
    )


def empty_caches_of(config: Config, mesh: Mesh, dtype: Any) -> list[KVCache]:
    """Caches for this device's batch."""
    return empty_caches(layers_per_stage(config, mesh), cache_shape(config, mesh), dtype)


def empty_gradients_of(config: Config, mesh: Mesh) -> list[Gradients]:
    """What the backward pass of this device's batch fills."""
    return empty_gradients(
        empty_caches_of(config, mesh, jnp.float32),
        param_shapes(config.model),
        block_class(config.model).linears,
        config.memory.defer_weight_grads,
        compute_dtype(config.precision, mesh),
    )


def layers_per_stage(config: Config, mesh: Mesh) -> int:
    """Of the stage that has most."""
    return max(layer_counts(config.model.num_layers, mesh.shape["pipe"]))


def cache_shape(config: Config, mesh: Mesh) -> tuple[int, int, int, int]:
    """Of the keys of a layer for this device's batch, `[B, H, T, K]`."""
    model = config.model
    batch_size = config.train.batch_size // mesh.shape["data"]
    _, num_keys, width = heads(model)
    return batch_size, num_keys, model.seq_len, width


def saved_bytes_per_token(config: Config, mesh: Mesh) -> int:
    """What the forward sweep keeps for the backward sweep, and what that gathers for each token."""
    saved = partial(empty_saved_of, config, mesh)

    def gathered() -> Any:
        return [(d.cache, d.d_outputs) for d in empty_gradients_of(config, mesh)]

    return sum(_bytes_per_token(config, mesh, buffers) for buffers in (saved, gathered))


def cache_bytes_per_token(config: Config, mesh: Mesh) -> int:
    """Of `saved_bytes_per_token`, what are keys, values and their gradients."""
    return sum(
        _bytes_per_token(config, mesh, partial(empty_caches_of, config, mesh, dtype))
        for dtype in (compute_dtype(config.precision, mesh), jnp.dtype(jnp.float32))
    )


def _bytes_per_token(config: Config, mesh: Mesh, buffers: Callable[[], Any]) -> int:
    """Bytes of buffers as long as the batch of a data shard, for one token on one device."""
    num_bytes = 0
    for path, a in jax.tree.leaves_with_path(jax.eval_shape(buffers)):
        is_whole = path[-1] in map(jax.tree_util.DictKey, UNDIVIDED)
        num_bytes += a.size * a.dtype.itemsize // (1 if is_whole else mesh.shape["model"])
    batch_size, _, seq_len, _ = cache_shape(config, mesh)
    return num_bytes // (batch_size * seq_len)
