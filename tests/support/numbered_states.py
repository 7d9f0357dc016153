"""Training states on any mesh, whose values tell where they belong."""

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from support import reference
from tpipe_jax.config.settings import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    resolved,
)
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.model import transformer
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import TrainState, abstract_state

MODEL = ModelConfig(num_layers=5, d_model=16, num_heads=4, vocab_size=11, seq_len=8)


def abstract(
    config: MeshConfig, shard_state: bool | None = None, num_chunks: int = 1
) -> tuple[Mesh, TrainState]:
    plan = PlanConfig(schedule="interleaved", chunks=num_chunks) if num_chunks > 1 else PlanConfig()
    run = resolved(Config(MODEL, config, plan, optim=OptimConfig(shard_state=shard_state)))
    mesh = make_mesh(config, jax.devices()[: config.num_devices])
    return mesh, abstract_state(make_spec(run, mesh), make_optimizer(run))


def numbered() -> Any:
    """Parameters whose elements are all different, none of them 0."""
    params = jax.eval_shape(lambda: transformer.init(MODEL, jax.random.key(0)))
    leaves, structure = jax.tree.flatten(params)
    starts = np.cumsum([1, *(leaf.size for leaf in leaves)])
    arrays = [
        np.arange(start, start + leaf.size, dtype=np.float32).reshape(leaf.shape)
        for start, leaf in zip(starts, leaves, strict=False)
    ]
    return jax.tree.unflatten(structure, arrays)


def state_on(
    config: MeshConfig, shard_state: bool | None = None, number: int = 7, num_chunks: int = 1
) -> TrainState:
    """A state with these parameters, moments that are twice and three times as large, and counts
    and scalars of `number`.
    """
    mesh, like = abstract(config, shard_state, num_chunks)
    params = reference.to_stages(numbered(), mesh, num_chunks)
    factors = {"mu": 2, "nu": 3}

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        names = [getattr(key, "name", None) for key in path]
        if leaf.ndim == 0:
            value: Any = np.full((), number, leaf.dtype)
        else:
            [depth] = [i for i, name in enumerate(names) if name in ("params", *factors)]
            value = params
            for key in path[depth + 1 :]:
                value = value[getattr(key, "key", getattr(key, "idx", None))]
            value = np.asarray(value) * factors.get(names[depth], 1)
        return jax.device_put(value, leaf.sharding)

    return jax.tree_util.tree_map_with_path(fill, like)
