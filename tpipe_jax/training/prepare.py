"""The parts of a run: settings, mesh, data and compiled programs that fit each other."""

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
from tpipe_jax.devices.exchanges import compile_checked
from tpipe_jax.model.local_init import check_local_init
from tpipe_jax.model.remat import candidates
from tpipe_jax.pipeline.spec import StageSpec, spec_on_devices
from tpipe_jax.pipeline.tick_program import large_copies
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.schedule import Schedule, make_schedule
from tpipe_jax.planning.settings import read_settings
from tpipe_jax.reporting.console import Console
from tpipe_jax.reporting.metrics import check_tracker
from tpipe_jax.reporting.prometheus import check_exporter
from tpipe_jax.training.memory import (
    budget,
    fitting_step,
    limit_bytes,
    program_bytes,
)
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_rows, abstract_state
from tpipe_jax.training.step import make_loss


@dataclass(frozen=True)
class Run:
    """The parts of a run, which have been checked to fit each other."""

    spec: StageSpec
    described: Config
    """The settings for config.json, where config.data.packing=auto is not yet resolved."""
    plan: Plan | PlanRequest
    """The plan that the settings give, or a request to plan before the first step."""
    train_data: Batches
    held_out: Batches
    optimizer: optax.GradientTransformation

    @property
    def config(self) -> Config:
        return self.spec.config

    @property
    def mesh(self) -> Mesh:
        return self.spec.mesh


def prepare(config: Config, devices: Sequence[jax.Device]) -> Run:
    """Returns the parts of a run. Writes nothing.

    Raises `UserError` if settings, devices and data don't fit each other.
    """
    if config.train.init == "local":
        check_local_init(config.model)
    spec = spec_on_devices(config, devices)
    described = spec.config
    candidates(described.memory)
    plan = read_settings(described)
    train_data, held_out = check_inputs(described)
    spec = spec.with_config(train_data.config)
    return Run(spec, described, plan, train_data, held_out, make_optimizer(spec.config))


def check_inputs(config: Config) -> tuple[Batches, Batches]:
    """Returns the training data and the held-out data.

    Checks what does not need a mesh. Raises `UserError` if settings and data don't fit.
    """
    check_tracker(config)
    if jax.process_index() == 0:
        check_exporter(config)
    train_data, held_out = open_data(config)
    for batches in (train_data, held_out):
        batches.batch(0, slice(8))  # mostly raises if their vocabulary is larger
    return train_data, held_out


class Programs(NamedTuple):
    """The compiled programs of a run."""

    train_step: Compiled
    loss: Compiled


def compile_programs(run: Run, plan: Plan, console: Console) -> Programs:
    """Compiles the training step, with the first rematerialisation that fits, and the loss.

    The planner may have assumed another rematerialisation: it relies on estimates, and this on
    what XLA says of the very program. Raises `Infeasible` if none fits.
    """
    start = time.monotonic()
    schedule = make_schedule(plan)
    spec, train_step = fitting_step(run.spec, plan, run.optimizer)
    params = abstract_state(spec, run.optimizer).params
    loss = compile_checked(make_loss(spec, schedule), spec.mesh, params, abstract_rows(spec))
    console.say(f"compiled in {time.monotonic() - start:.0f} s")
    if spec.device.platform == "gpu":
        _warn_of_copies(spec, schedule, train_step, console)
    console.show_budget(
        budget(spec, schedule, run.optimizer),
        spec.config.memory.remat,
        program_bytes(train_step),
        limit_bytes(spec),
    )
    return Programs(train_step, loss)


def _warn_of_copies(
    spec: StageSpec, schedule: Schedule, train_step: Compiled, console: Console
) -> None:
    """Says so if the program copies buffers in each tick, which may take longer than its work."""
    copied = large_copies(train_step.as_text() or "", spec, schedule)
    if copied:
        console.say(
            f"warning: each tick copies up to {copied / 1e6:.0f} MB, which slows the step down: "
            "install a newer jax, remove flags from XLA_FLAGS, or try slices of one length, such "
            "as config.plan.token_slices=uniform:16."
        )
