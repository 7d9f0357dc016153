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
from tpipe_jax.buffers import (
    UNDIVIDED,
    Deferral,
    Gradients,
    Saved,
    empty_caches,
    empty_gradients,
    empty_saved,
)
from tpipe_jax.config import Config
from tpipe_jax.layer import block_class, block_functions, heads, param_shapes, value_widths
from tpipe_jax.pipeline import varying
from tpipe_jax.placement import chunk_counts, chunk_slots, layer_counts
from tpipe_jax.precision import compute_dtype
from tpipe_jax.remat import saved_names
from tpipe_jax.stage import Chunk, Stage


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
    num_stages = lax.axis_size("pipe")
    counts = chunk_counts(config.model.num_layers, num_stages, config.plan.num_chunks)
    block = block_functions(config.model, compute_dtype(config.precision, mesh))
    return Stage(
        block,
        make_attention(config, mesh),
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


def activation_bytes_per_token(config: Config, mesh: Mesh) -> tuple[int, int]:
    """What is kept on a device for each token of a sequence in the pipeline, and besides for each
    of one that goes backward.
    """
    saved, gathered = _shapes(config, mesh, empty_saved_of), cache_bytes_per_token(config, mesh)[1]
    to_the_end = deferral(config) == "to the end"
    left = deferred_bytes_per_token(config, mesh) if to_the_end else 0
    return _bytes_per_token(config, mesh, saved) + left, gathered


def deferred_bytes_per_token(config: Config, mesh: Mesh) -> int:
    """Of a slice that waits for gradients of weights."""
    d_outputs = [d.d_outputs for d in _shapes(config, mesh, empty_gradients_of)]
    return _bytes_per_token(config, mesh, d_outputs)


def trunk_bytes_per_token(config: Config, mesh: Mesh) -> int:
    """What the stage is given, or makes of it."""
    return config.model.d_model * compute_dtype(config.precision, mesh).itemsize


def cache_bytes_per_token(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Of `activation_bytes_per_token`, what are keys, values and their gradients."""
    saved, gathered = (
        _bytes_per_token(config, mesh, [d.cache for d in _shapes(config, mesh, buffers)])
        for buffers in (empty_saved_of, empty_gradients_of)
    )
    return saved, gathered


def _shapes(config: Config, mesh: Mesh, buffers: Callable[..., list[Any]]) -> list[Any]:
    """Buffers for one sequence, without their memory."""
    return jax.eval_shape(partial(buffers, config, mesh, num_rows=1))


def _bytes_per_token(config: Config, mesh: Mesh, buffers: Any) -> int:
    """Bytes of buffers for one sequence, for one token on one device."""
    num_bytes = 0
    for path, a in jax.tree.leaves_with_path(buffers):
        is_whole = path[-1] in map(jax.tree_util.DictKey, UNDIVIDED)
        num_bytes += a.size * a.dtype.itemsize // (1 if is_whole else mesh.shape["model"])
    return num_bytes // config.model.seq_len
