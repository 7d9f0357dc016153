"""What training changes: parameters, optimiser state and step, and where they lie."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from tpipe_jax.config import Config
from tpipe_jax.mesh import layer_counts, param_specs, shardings, to_stages
from tpipe_jax.model import Params, init


class TrainState(NamedTuple):
    """What training changes and a checkpoint holds."""

    params: Params
    opt_state: optax.OptState
    step: Array


def abstract_state(
    config: Config, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, dtypes and shardings of a state, without its arrays."""
    shapes = jax.eval_shape(partial(_new_state, config, mesh, optimizer))
    num_blocks = max(layer_counts(config.model.num_layers, config.mesh.pipe))
    specs = param_specs(num_blocks)
    chex.assert_trees_all_equal_structs(shapes.params, specs)
    opt_specs = optax.tree_map_params(
        optimizer.init,
        lambda _, spec: spec,
        shapes.opt_state,
        specs,
        transform_non_params=lambda _: PartitionSpec(),
    )
    places = shardings(
        mesh, shapes._replace(params=specs, opt_state=opt_specs, step=PartitionSpec())
    )
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, places
    )


def init_state(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state on the mesh; its parameters depend on the seed alone.

    Every device draws the blocks of all stages for a moment and keeps its own.
    """
    places = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh, optimizer))
    return jax.jit(partial(_new_state, config, mesh, optimizer), out_shardings=places)()


def _new_state(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    params = to_stages(init(config.model, jax.random.key(config.train.seed)), mesh)
    return TrainState(params, optimizer.init(params), jnp.int32(0))
