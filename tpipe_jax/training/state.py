"""The state of training, and where it lies on the mesh: parameters, optimiser state, counts."""

import math
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Wrapped

from tpipe_jax.data.rows import RowLayout
from tpipe_jax.devices.mesh import over_data, shardings
from tpipe_jax.model.block import Params
from tpipe_jax.model.functional import init_block
from tpipe_jax.model.local_init import check_local_init, local_block, local_positions
from tpipe_jax.model.sharding import padded_vocab_size, param_specs
from tpipe_jax.model.transformer import block_keys, init
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.placement import stage_layers
from tpipe_jax.training.health import Health, new_health
from tpipe_jax.training.loss_scale import LossScale, new_loss_scale


class TrainState(NamedTuple):
    """All that a training step changes, and that a checkpoint holds."""

    params: Params
    opt_state: optax.OptState
    step: Array
    loss_scale: LossScale
    health: Health


def abstract_state(spec: StageSpec, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns shapes, dtypes and shardings of a state, without its arrays."""
    mesh, is_divided = spec.mesh, spec.config.optim.shard_state
    shapes = jax.eval_shape(partial(_new_state, spec, optimizer))
    specs = param_specs(spec.config.model, spec.layers_per_stage)
    chex.assert_trees_all_equal_structs(shapes.params, specs)
    opt_specs = optax.tree_map_params(
        optimizer.init,
        lambda moment, own: over_data(mesh, own, moment.shape) if is_divided else own,
        shapes.opt_state,
        specs,
        transform_non_params=lambda _: PartitionSpec(),
    )
    other_specs = jax.tree.map(lambda _: PartitionSpec(), shapes._replace(params={}, opt_state=()))
    places = shardings(mesh, other_specs._replace(params=specs, opt_state=opt_specs))
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, places
    )


def abstract_rows(spec: StageSpec) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and sharding of a batch of rows (`batches.make_row`) on the mesh."""
    shape = RowLayout.of(spec.config).shape(spec.config.train.batch_size)
    sharding = NamedSharding(spec.mesh, PartitionSpec("data"))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def init_state(spec: StageSpec, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns a fresh state on the mesh. Its parameters depend only on the model and the seed."""
    return init_step(spec, optimizer)()


def init_step(spec: StageSpec, optimizer: optax.GradientTransformation) -> Wrapped:
    """Returns the program that makes a fresh state. Devices draw only the blocks of their stage."""
    places = jax.tree.map(lambda a: a.sharding, abstract_state(spec, optimizer))
    return jax.jit(partial(_new_state, spec, optimizer), out_shardings=places)


def _new_state(spec: StageSpec, optimizer: optax.GradientTransformation) -> TrainState:
    params = _new_params(spec)
    loss_scale = new_loss_scale(spec.config.precision)
    return TrainState(params, optimizer.init(params), jnp.int32(0), loss_scale, new_health())


def _new_params(spec: StageSpec) -> Params:
    model, key = spec.config.model, jax.random.key(spec.config.train.seed)
    params, keys = init(model, key), block_keys(model, key)
    draw = jax.jit(jax.vmap(partial(init_block, model)))
    is_local = spec.config.train.init == "local"
    if is_local:
        check_local_init(model)

    def blocks(layer_P: np.ndarray) -> Params:
        is_layer_P, drawn = layer_P >= 0, draw(keys[np.maximum(layer_P, 0)])
        drawn = local_block(model, drawn) if is_local else drawn
        return jax.tree.map(
            lambda a: jnp.where(is_layer_P.reshape(-1, *[1] * (a.ndim - 1)), a, 0), drawn
        )

    def padded(table_VD: Array) -> Array:
        fill = padded_vocab_size(model, spec.mesh) - len(table_VD)
        return jnp.pad(table_VD, ((0, fill), (0, 0)))

    embed = params["embed"] | {"tokens": padded(params["embed"]["tokens"])}
    if is_local and "positions" in embed:
        embed["positions"] = local_positions(model)
    return params | {
        "embed": embed,
        **({"head": jax.tree.map(padded, params["head"])} if "head" in params else {}),
        "blocks": [
            blocks(layer_P)
            for layer_P in stage_layers(model.num_layers, spec.num_stages, spec.num_chunks)
        ],
    }


def state_bytes(state: TrainState) -> tuple[int, int]:
    """Returns bytes of parameters and of optimiser state on a device; the state may be abstract."""

    def num_bytes(tree: Any) -> int:
        return sum(
            math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
            for a in jax.tree.leaves(tree)
        )

    return num_bytes(state.params), num_bytes(state.opt_state)
