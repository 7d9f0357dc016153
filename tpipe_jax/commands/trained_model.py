"""The model of a run's checkpoint, on a mesh, for what comes after training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from tpipe_jax.checkpoint.arrays import restore
from tpipe_jax.checkpoint.checkpoints import newest_sound
from tpipe_jax.config.settings import Config, PlanConfig
from tpipe_jax.model.block import Params
from tpipe_jax.pipeline.spec import StageSpec, make_spec, spec_on_devices
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state


class Trained(NamedTuple):
    """A model with its parameters."""

    spec: StageSpec
    params: Params
    step: int

    @property
    def config(self) -> Config:
        return self.spec.config

    @property
    def mesh(self) -> Mesh:
        return self.spec.mesh

    def with_config(self, config: Config) -> "Trained":
        """The same model under settings that differ in data or batch."""
        return self._replace(spec=make_spec(config, self.mesh))


def load(workdir: Path, step: int | None, config: Config, devices: Sequence[jax.Device]) -> Trained:
    """The newest sound checkpoint of a run, or that of a step, on the mesh of the config, whose
    model does not matter, and on the first of the devices.

    Raises `UserError` if there is none, or if it does not fit the mesh.
    """
    checkpoint, model = newest_sound(workdir, step)
    config = replace(config, model=model, plan=PlanConfig())  # stages without chunks
    spec = spec_on_devices(config, devices[: config.mesh.num_devices])
    like = abstract_state(spec, make_optimizer(spec.config))
    params = restore(checkpoint, model, {"params": like.params})["params"]
    return Trained(spec, params, int(checkpoint.name))
