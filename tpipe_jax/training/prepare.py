"""What a run is made of: settings, mesh, data and compiled programs that fit each other."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh
from jax.stages import Compiled

from tpipe_jax.config.settings import Config
from tpipe_jax.data.batches import Batches, open_data
from tpipe_jax.devices.hlo import compile_checked
from tpipe_jax.model.remat import candidates
from tpipe_jax.pipeline.spec import on_devices
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.settings import read_settings
from tpipe_jax.reporting.console import Console
from tpipe_jax.reporting.measured_ticks import check_trace
from tpipe_jax.reporting.metrics import check_tracker
from tpipe_jax.training.memory import budget, fitting_step, limit_bytes, program_bytes
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_rows, abstract_state
from tpipe_jax.training.step import make_loss


@dataclass(frozen=True)
class Run:
    """What a run is made of, found to fit together."""

    config: Config
    described: Config
    """As config.json has it: without what config.data.packing=auto has become."""
    mesh: Mesh
    plan: Plan | PlanRequest
    """As the settings have it; what they leave open is planned before the run starts."""
    train_data: Batches
    held_out: Batches
    optimizer: optax.GradientTransformation


def prepare(config: Config, devices: Sequence[jax.Device]) -> Run:
    """Checks settings, devices and data against each other, and writes nothing.

    Raises `UserError` where they don't fit.
    """
    config, mesh = on_devices(config, devices)
    candidates(config.memory)
    plan = read_settings(config)
    train_data, held_out = check_inputs(config)
    described, config = config, train_data.config
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    return Run(config, described, mesh, plan, train_data, held_out, optimizer)


def check_inputs(config: Config) -> tuple[Batches, Batches]:
    """The data to train on and what is held out, of settings that fit them, whatever the mesh."""
    check_trace(config)
    check_tracker(config)
    train_data, held_out = open_data(config)
    for batches in (train_data, held_out):
        batches.batch(0, slice(8))  # a vocabulary of another size mostly shows here
    return train_data, held_out


class Programs(NamedTuple):
    """What a run executes."""

    train_step: Compiled
    loss: Compiled


def compile_programs(run: Run, plan: Plan, console: Console) -> Programs:
    """Compiles the training step, with the rematerialisation that fits, and the loss.

    Slices may have been planned for another, since that follows from estimates and this from what
    XLA says of the very program. Raises `UserError` if none fits.
    """
    start = time.monotonic()
    schedule = make_schedule(plan)
    config, train_step = fitting_step(run.config, run.mesh, plan, run.optimizer)
    params = abstract_state(config, run.mesh, run.optimizer).params
    loss = compile_checked(
        make_loss(config, run.mesh, schedule),
        run.mesh,
        params,
        abstract_rows(config, run.mesh),
    )
    console.say(f"compiled in {time.monotonic() - start:.0f} s")
    console.show_budget(
        budget(config, run.mesh, schedule, run.optimizer),
        config.memory.remat,
        program_bytes(train_step),
        limit_bytes(config, run.mesh),
    )
    return Programs(train_step, loss)
