"""Loads the model of a run's checkpoint onto a mesh, to evaluate it or to generate text."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from tpipe_jax.checkpoint.arrays import restore
from tpipe_jax.checkpoint.checkpoints import block_change, newest_sound, warn
from tpipe_jax.checkpoint.manifest import read_manifest
from tpipe_jax.config.settings import BUILT_IN, Config, ModelConfig, PlanConfig
from tpipe_jax.config.user_code import block_digest
from tpipe_jax.errors import UserError, shown
from tpipe_jax.model.block import Params
from tpipe_jax.pipeline.spec import StageSpec, spec_on_devices
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
        """Returns the same model with a config that differs only in data or batch."""
        return self._replace(spec=self.spec.with_config(config))


def load(workdir: Path, step: int | None, config: Config, devices: Sequence[jax.Device]) -> Trained:
    """Loads a run's newest sound checkpoint, or the one of `step`, onto the mesh of the config.

    The mesh takes the first of the devices. The model is the checkpoint's, not the config's. But a
    block of the user's own is code, and a run may come from somebody else: so it is the block that
    `config.model.block` names, never the one that the checkpoint names. Raises `UserError` if that
    is missing, if there is no sound checkpoint, or if its model does not fit the mesh.
    """
    checkpoint, model = newest_sound(workdir, step)
    model = _with_named_block(workdir, checkpoint, model, config.model.block)
    config = replace(config, model=model, plan=PlanConfig())  # one chunk for each stage
    spec = spec_on_devices(config, devices[: config.mesh.num_devices])
    like = abstract_state(spec, make_optimizer(spec.config))
    params = restore(checkpoint, model, {"params": like.params})["params"]
    return Trained(spec, params, int(checkpoint.name))


def _with_named_block(
    workdir: Path, checkpoint: Path, model: ModelConfig, named: str
) -> ModelConfig:
    """Returns the model with the block that the user has named. Warns if its file is not the one
    with which the checkpoint was written.
    """
    if not model.has_own_block:
        if named == BUILT_IN:
            return model
        raise UserError(
            f"config.model.block={named} would not be used, since the model in {workdir} has "
            "the blocks of its family: leave it out."
        )
    then = read_manifest(checkpoint).block
    if named == BUILT_IN:
        digest = "" if then is None else f" (of SHA-256 {then})"
        raise UserError(
            f"the model in {workdir} has config.model.block={shown(model.block)}{digest}, which is "
            "code and is only loaded if you name it: read that file, then add "
            f"--config.model.block={shown(model.block)}."
        )
    model = replace(model, block=named)
    try:
        now = block_digest(model)
    except OSError:  # the file is missing, which is answered when it is loaded
        now = None
    if line := block_change(named, now, then):
        warn(line)
    return model
