"""Makes the stage of a device from its spec: layers, buffers, and programs over all devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.stages import Wrapped

from tpipe_jax.attention.base import KVCache
from tpipe_jax.devices.collectives import needs_sums, varying
from tpipe_jax.devices.inplace import on_host
from tpipe_jax.devices.mesh import manual_part
from tpipe_jax.model.block import Params
from tpipe_jax.model.folding import fold, unfold_gradients
from tpipe_jax.model.functional import block_functions, param_shapes, value_widths
from tpipe_jax.model.registry import block_class
from tpipe_jax.model.sharding import param_specs
from tpipe_jax.model.transformer import head_table
from tpipe_jax.pipeline import vocab_parallel
from tpipe_jax.pipeline.buffers import (
    Gradients,
    Saved,
    empty_caches,
    empty_gradients,
    empty_saved,
)
from tpipe_jax.pipeline.packing import NOTHING, Packing
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.pipeline.stage import Chunk, Stage
from tpipe_jax.planning.placement import chunk_places

# Tokens of each product of deferred gradients of weights, by platform: enough for the product to
# take longer than adding it to its sum. On a CPU 256 to 1024 are equally fast (docs/design.md).
DEFERRED_TOKENS = {"gpu": 16384}


def for_compute(spec: StageSpec, params: Params) -> Params:
    """Returns the parameters of this device. Blocks have their norms folded into linear layers
    (`folding`), and matrices, and what else linear layers have, in the format of matrix products.

    The parameters are marked as different on each data shard. So gradients are summed over the data
    shards once, at the end of the step, and not after each product.
    """
    block_type = block_class(spec.config.model)

    def in_format(name: str, a: Array) -> Array:
        return a.astype(spec.dtype) if a.ndim > 1 or name in block_type.linears else a

    def prepared(block: Params) -> Params:
        folded = fold(block_type.norms, _own_block(block))
        return {
            name: jax.tree.map(partial(in_format, name), layer) for name, layer in folded.items()
        }

    blocks = [prepared(block) for block in params["blocks"]]
    return varying(params | {"blocks": blocks}, ("data",))


def block_gradients(spec: StageSpec, params: Params, gradients: list[Params]) -> list[Params]:
    """Returns the gradients of this device's blocks, with their first axis 'pipe', from those of
    the parameters that `for_compute` has made of them.
    """
    norms = block_class(spec.config.model).norms
    found = [
        unfold_gradients(norms, varying(_own_block(block), ("data",)), own)
        for block, own in zip(params["blocks"], gradients, strict=True)
    ]
    return [jax.tree.map(lambda a: a[None], block) for block in found]


def _own_block(block: Params) -> Params:
    return jax.tree.map(lambda a: a[0], block)  # the first axis is 'pipe'


def make_head(spec: StageSpec, params: Params) -> vocab_parallel.Head:
    """Makes the head from the parameters of this device."""
    return vocab_parallel.Head(params["norm"], head_table(params).astype(spec.dtype))


def make_stage(
    spec: StageSpec,
    params: Params,
    packing: Packing = NOTHING,
    starts_BT1: Array | None = None,
) -> Stage:
    """Makes the layers of the stage from the parameters of this device. `packing` is that of the
    values that they save.
    """
    places = chunk_places(spec.chunk_layers)
    return Stage(
        block_functions(spec.config.model, spec.dtype, spec.heads.num_keys),
        spec.heads.num_queries,
        spec.attention,
        params["blocks"],
        tuple(
            Chunk(own, jnp.array(counts)[lax.axis_index("pipe")], min(counts))
            for own, counts in zip(places, spec.chunk_layers, strict=True)
        ),
        packing,
        DEFERRED_TOKENS.get(spec.device.platform, 1024),
        starts_BT1,
        None if spec.attention.window else spec.config.model.window,
        spec.config.model.experts_of_token,
        skips=spec.skips,
    )


def cache_shape(spec: StageSpec, num_rows: int) -> tuple[int, ...]:
    """The shape of the keys of one layer for `num_rows` sequences."""
    return spec.attention.layout.shape(num_rows, spec.config.model.seq_len, spec.heads)


def caches_of(spec: StageSpec, dtype: Any, num_rows: int) -> list[KVCache]:
    """Returns zeroed caches of this device for `num_rows` sequences."""
    return empty_caches(spec.layers_per_stage, cache_shape(spec, num_rows), dtype)


def saved_of(spec: StageSpec, packing: Packing, num_rows: int) -> list[Saved]:
    """Returns buffers of this device for the forward passes of `num_rows` sequences.

    Values are written before they are read, so that nothing need be there before; caches are zeros,
    since fused kernels also multiply what they mask. Products of the whole batch at the end read
    the values of places without a layer, too. With config.memory.offload the values are in the
    host's memory; attention reads caches again and again, so these are not.
    """
    caches = caches_of(spec, spec.dtype, num_rows)
    make = jnp.zeros if spec.weight_grads == "at the end" else lax.empty
    if spec.config.memory.offload:
        make = partial(_made_on_host, make)
    num_experts = spec.config.model.num_experts if spec.config.balance_weight else 0
    return empty_saved(caches, packing, spec.heads.num_queries, make, num_experts or 0)


def _made_on_host(
    make: Callable[[tuple[int, ...], Any], Array], shape: tuple[int, ...], dtype: Any
) -> Array:
    """Makes a buffer in the host's memory."""
    return on_host(make(shape, dtype))


def packing_of(spec: StageSpec, num_tokens: int) -> Packing:
    """Which values a layer saves, and which of them share a buffer, for slices of at most so many
    tokens. Whole sequences share none: their values need not be written into buffers.
    """
    model, all_heads = spec.config.model, spec.heads.num_queries * spec.heads.width
    widths = {**value_widths(model), "attn": all_heads, "q": all_heads}
    # A router's logits are few, and choose the same experts again.
    names = (*spec.saved_names, block_class(model).router_logits)
    kept = {name: widths[name] for name in dict.fromkeys(names) if name in widths}
    is_joined = spec.joins_arrays and num_tokens < model.seq_len
    return Packing.of({"x": model.d_model} | kept, is_joined)


def gradients_of(
    spec: StageSpec, num_rows: int, outputs: tuple[int, int] | None = None
) -> list[Gradients]:
    """Returns zeroed buffers of this device for the backward passes of `num_rows` sequences at a
    time.

    `outputs` are the rows and tokens of the buffers for gradients with respect to the outputs of
    linear layers; None means `num_rows` and the sequence length.
    """
    model, block_type = spec.config.model, block_class(spec.config.model)
    shapes = {n: a for n, a in param_shapes(model).items() if n not in block_type.norms}
    has_biases = any("bias" in shapes[name] for name in block_type.linears)
    return empty_gradients(
        caches_of(spec, jnp.float32, num_rows),
        shapes,
        block_type.linears,
        spec.weight_grads,
        outputs or (num_rows, model.seq_len),
        spec.dtype,
        spec.joins_arrays and spec.weight_grads == "at once" and has_biases,
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
