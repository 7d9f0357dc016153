"""Fresh states: what they hold, where it lies, and how much memory it takes to make them."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from support import reference
from tpipe_jax.config.settings import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    resolved,
)
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.model import transformer
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import TrainState, abstract_state, init_state, init_step, state_bytes

MODEL = ModelConfig(5, 16, 2, 24, vocab_size=11, seq_len=12)


def open_mesh(config: Config) -> Mesh:
    return make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])


def abstract(config: Config) -> TrainState:
    optimizer = make_optimizer(config)
    return abstract_state(make_spec(config, open_mesh(config)), optimizer)


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(2, 2, 2)], ids=str)
def test_parameters_are_those_of_the_plain_model(mesh_config: MeshConfig):
    """Whatever the mesh; the second has a stage with a layer less and a vocabulary to fill up."""
    config = Config(MODEL, mesh_config, train=TrainConfig(seed=3))
    optimizer = make_optimizer(config)
    state = init_state(make_spec(config, open_mesh(config)), optimizer)
    plain = jax.jit(partial(transformer.init, MODEL))(jax.random.key(3))
    expected = jax.jit(partial(reference.to_stages, mesh=open_mesh(config)))(plain)
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(expected))
    for moment in jax.tree.leaves(state.opt_state):
        assert not jnp.asarray(jax.device_get(moment)).any()
    places = [tree.sharding for tree in jax.tree.leaves(state)]
    assert places == [tree.sharding for tree in jax.tree.leaves(abstract(config))]


def test_no_device_draws_the_blocks_of_other_stages():
    """Of 8 stages with 3 MB of blocks each, 24 MB in all."""
    config = Config(ModelConfig(8, 256, 4, vocab_size=16, seq_len=16), MeshConfig(pipe=8))
    optimizer = make_optimizer(config)
    analysis = (
        init_step(make_spec(config, open_mesh(config)), optimizer)
        .lower()
        .compile()
        .memory_analysis()
    )
    assert analysis is not None
    params, opt_state = state_bytes(abstract(config))
    assert 3e6 < params < 4e6
    assert analysis.output_size_in_bytes == pytest.approx(params + opt_state, rel=0.01)
    assert analysis.temp_size_in_bytes < 2 * params


def test_data_shards_divide_the_optimiser_state():
    """All of it but the number of steps."""
    config = Config(ModelConfig(2, 64, 4, vocab_size=64, seq_len=64), MeshConfig(data=4, pipe=2))
    params, opt_state = state_bytes(abstract(config))
    assert resolved(config).optim.shard_state
    whole = dataclasses.replace(config, optim=OptimConfig(shard_state=False))
    params_then, whole_opt_state = state_bytes(abstract(whole))
    assert params_then == params
    assert whole_opt_state == pytest.approx(2 * params, rel=0.01)
    assert opt_state == pytest.approx(whole_opt_state / 4, rel=0.01)
    # One data shard has nothing to divide.
    alone = dataclasses.replace(config, mesh=MeshConfig(pipe=2))
    assert not resolved(alone).optim.shard_state
    assert state_bytes(abstract(alone)) == (params, whole_opt_state)
