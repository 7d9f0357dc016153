"""The library: plans, steps and runs in a Python program of your own. See `examples/`.

All functions take a `Config`, which has the settings of the command line, and the devices to work
on. Without devices they take those of jax. On CPUs they first make as many devices as the mesh asks
for, unless jax has been used before. The process then keeps the memory that it frees, which is
faster. If something does not fit, they raise `UserError`: one sentence that says what to do.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax import Array

from tpipe_jax.commands.train import train as run_training
from tpipe_jax.commands.trained_model import Trained
from tpipe_jax.commands.trained_model import load as load_trained
from tpipe_jax.config.command_line import load_config
from tpipe_jax.config.settings import Config, MeshConfig
from tpipe_jax.devices.mesh import put_rows
from tpipe_jax.devices.startup import find_devices
from tpipe_jax.errors import UserError
from tpipe_jax.pipeline.spec import StageSpec, spec_on_devices
from tpipe_jax.planning.latency import LatencyTable
from tpipe_jax.planning.plan import Plan, PlanRequest, check_plan
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.planning.settings import read_settings, work_factors
from tpipe_jax.profiling.measured_plan import plan_slices
from tpipe_jax.reporting.console import Console
from tpipe_jax.training.memory import fitting_step
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import TrainState, abstract_rows, init_state

Devices = Sequence[jax.Device]


def plan(
    config: Config,
    latencies: LatencyTable | None = None,
    workdir: Path | str | None = None,
    devices: Devices | None = None,
) -> Plan:
    """Returns how a run of this config would slice its batch and sequences.

    If the settings leave the slices open, they are planned from latencies. Latencies that are not
    given are measured, which needs the devices and takes minutes on CPUs. With a workdir, they are
    kept there and used again the next time.
    """
    request = read_settings(config)
    if isinstance(request, Plan):
        return request
    if latencies is not None:
        return find_plan(latencies, request, work_factors(config)).plan
    spec = spec_on_devices(config, devices or _devices(config.mesh))
    with tempfile.TemporaryDirectory() as folder:
        where = Path(workdir or folder)
        return plan_slices(spec, request, where, Console(is_quiet=True))[1].plan


class TrainStep:
    """A compiled training step on its mesh: `state, metrics = step(state, rows)`."""

    def __init__(self, spec: StageSpec, plan: Plan) -> None:
        self.plan, self._optimizer = plan, make_optimizer(spec.config)
        self._spec, self._step = fitting_step(spec, plan, self._optimizer)
        self.config, self.mesh = self._spec.config, self._spec.mesh
        self._last: dict[str, Array] = {}

    def init(self) -> TrainState:
        """Returns fresh parameters and optimiser state, drawn with config.train.seed."""
        return init_state(self._spec, self._optimizer)

    def __call__(
        self, state: TrainState, rows: np.ndarray | Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """Returns the next state, and the metrics as scalars: `loss` (nats per token), `grad_norm`
        and others.

        `data.rows.RowLayout` describes the rows, int32 `[B, ...]`. Tokens are below the
        vocabulary's size; a target may also be `config.IGNORE`. The old state is donated, so it
        cannot be used again. Raises `UserError` if the rows have another shape.
        """
        like = abstract_rows(self._spec)
        if rows.shape != like.shape:
            raise UserError(
                f"rows of shape {rows.shape} must be of {like.shape}, as the config is."
            )
        if isinstance(rows, np.ndarray):
            rows = put_rows(self.mesh, rows.astype(np.int32))
        else:
            rows = jax.device_put(rows.astype(like.dtype), like.sharding)
        state, metrics = self._step(state, rows)
        # If devices of a process fall many steps behind, they may wait for each other for ever.
        jax.block_until_ready(self._last)
        self._last = metrics
        return state, metrics


def make_train_step(
    config: Config, slices: Plan | None = None, devices: Devices | None = None
) -> TrainStep:
    """Compiles the training step of a plan; without a plan, the step of `plan(config)`."""
    read_settings(config)  # raises `UserError` for settings that do not fit
    slices = slices or plan(config, devices=devices)
    spec = spec_on_devices(config, devices or _devices(config.mesh))
    batch_size = config.train.batch_size // config.mesh.data
    num_layers = config.model.num_layers
    request = PlanRequest(config.mesh.pipe, batch_size, config.model.seq_len, num_layers=num_layers)
    check_plan("the plan", slices, request)
    return TrainStep(spec, slices)


def train(config: Config, workdir: Path | str, devices: Devices | None = None) -> None:
    """Plans, trains, evaluates and saves, as `python launch/multihost.py` does in one process. Goes
    on where an earlier call has stopped.
    """
    run_training(config, Path(workdir), devices or _devices(config.mesh), Console())


def load(
    workdir: Path | str,
    step: int | None = None,
    config: Config | None = None,
    devices: Devices | None = None,
) -> Trained:
    """Loads the model of a run's newest sound checkpoint, or of `step`, onto a mesh.

    Returns a `Trained`: `spec`, `params` and `step`, and by name `config` and `mesh`. It is for
    `generate.Generator` and `evaluate.evaluate`. The given config says how the model is laid out,
    with `mesh` and `precision`. The model itself is the checkpoint's, and the data settings are the
    run's.
    """
    config = config or Config()
    path = Path(workdir) / "config.json"
    if path.exists():
        config = replace(config, data=load_config(path).data)
    return load_trained(Path(workdir), step, config, devices or _devices(config.mesh))


def _devices(mesh: MeshConfig) -> Devices:
    try:
        devices = find_devices(mesh)
        return devices if mesh.auto else devices[: mesh.num_devices]
    except RuntimeError:  # jax has been used before, so its devices are fixed
        return jax.devices()[: mesh.num_devices]
