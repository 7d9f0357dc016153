"""Generation through the pipeline: the program that reads some tokens and returns the logits of the
next ones.
"""

from functools import partial

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Wrapped

from tpipe_jax.attention.base import KVCache
from tpipe_jax.devices.collectives import from_stage, needs_sums
from tpipe_jax.devices.inplace import Position
from tpipe_jax.devices.mesh import manual_part
from tpipe_jax.model.block import Params
from tpipe_jax.model.sharding import param_specs
from tpipe_jax.pipeline import vocab_parallel
from tpipe_jax.pipeline.buffers import empty_caches
from tpipe_jax.pipeline.build import (
    cache_shape,
    for_compute,
    make_head,
    make_stage,
)
from tpipe_jax.pipeline.executor import sweep
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.schedule import IDLE, Item


def make_decode(spec: StageSpec, is_for_all: bool = False) -> Wrapped:
    """Makes the program from `(params, caches, tokens [B, L], first, index)` to the logits after
    `tokens[:, index]`, `[B, 1, V]`, on all devices, and the caches with these tokens added.

    With `is_for_all` it returns the logits after each of the tokens, `[B, L, V]`.

    The tokens start at position `first` of their sequences; the caches hold the tokens before it.
    The caches that the program is given are donated.
    """

    def local(
        params: Params, caches: list[KVCache], tokens_BL: Array, first: Array, index: Array
    ) -> tuple[Array, list[KVCache]]:
        num_stages, (B, L) = lax.axis_size("pipe"), tokens_BL.shape
        params = for_compute(spec, params)
        stage, head = make_stage(spec, params), make_head(spec, params)
        embed = {**params["embed"]}
        if "positions" in embed:
            embed["positions"] = lax.dynamic_slice_in_dim(embed["positions"], first, L)

        def work(
            chunk: int, x_BLD: Array, at: Position, caches: list[KVCache]
        ) -> tuple[Array, list[KVCache]]:
            return stage.infer(chunk, x_BLD, Position(at.row, first), caches)

        chunks = range(len(stage.chunks))
        y_BLD, caches = sweep(
            # One slice goes from stage to stage, once in each chunk.
            np.concatenate([np.where(np.eye(num_stages, dtype=bool), c, IDLE) for c in chunks]),
            [Item(0, 0, B, L, chunk=c) for c in chunks],
            work,
            vocab_parallel.embed(embed, tokens_BL, spec.dtype),
            jax.tree.map(lambda a: a[0], caches),
            skips=spec.skips,
        )
        if not is_for_all:
            y_BLD = lax.dynamic_slice_in_dim(y_BLD, index, 1, axis=1)
        y_BLD = from_stage(-1, y_BLD)
        logits_BLV = vocab_parallel.logits(spec.config.model, head, y_BLD)
        return logits_BLV, jax.tree.map(lambda a: a[None], caches)

    specs = manual_part(param_specs(spec.config.model, spec.layers_per_stage))
    caches = PartitionSpec("pipe", "data")
    mapped = jax.shard_map(
        local,
        mesh=spec.mesh,
        axis_names={"data", "pipe"},
        in_specs=(specs, caches, PartitionSpec("data"), PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec("data", None, "pipe"), caches),
        check_vma=needs_sums(spec.mesh),
    )
    out_shardings = NamedSharding(spec.mesh, PartitionSpec()), _decode_sharding(spec)
    return jax.jit(mapped, donate_argnums=1, out_shardings=out_shardings)


def empty_decode_caches(spec: StageSpec) -> list[KVCache]:
    """Returns empty caches `[P, B, ...]` for `make_decode`, with one sequence a data shard."""
    shape = spec.num_stages, *cache_shape(spec, spec.mesh.shape["data"])

    @partial(jax.jit, out_shardings=_decode_sharding(spec))
    def empty() -> list[KVCache]:
        return empty_caches(spec.layers_per_stage, shape, spec.dtype)

    return empty()


def _decode_sharding(spec: StageSpec) -> NamedSharding:
    _, *by_heads = spec.attention.layout.spec
    return NamedSharding(spec.mesh, PartitionSpec("pipe", "data", *by_heads))
