"""The library: plans, steps and runs in a Python program of your own. See `examples/`.

All functions take a `Config`, which has the settings of the command line, and the devices to work
on. Without devices they take those of jax. On CPUs they first make as many devices as the mesh asks
for, unless jax has been used before. The process then keeps the memory that it frees, which is
faster. Options of jax that would change how they compute, as `jax_enable_x64`, do not apply inside
them. If something does not fit, they raise `UserError`: one sentence that says what to do.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from tpipe_jax.commands.evaluate import Evaluation, evaluate
from tpipe_jax.commands.generate import Generator, chooser, until_end
from tpipe_jax.commands.prompts import encode_prompt, ends_of, tokenizer_of
from tpipe_jax.commands.train import train as run_training
from tpipe_jax.commands.trained_model import Trained
from tpipe_jax.commands.trained_model import load as load_trained
from tpipe_jax.config.config_files import load_config
from tpipe_jax.config.own_runs import RUN_FILE, check_named
from tpipe_jax.config.settings import Config, MeshConfig
from tpipe_jax.data.batches import open_held_out
from tpipe_jax.data.carried import with_kept_tokenizer
from tpipe_jax.data.sources import open_shares
from tpipe_jax.devices.mesh import put_rows
from tpipe_jax.devices.startup import find_devices
from tpipe_jax.errors import UserError
from tpipe_jax.interop import convert
from tpipe_jax.pipeline.spec import StageSpec, spec_on_devices
from tpipe_jax.planning.latency import LatencyTable
from tpipe_jax.planning.plan import Plan, PlanRequest, check_plan
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.planning.settings import check_plan_serves, read_settings, work_factors
from tpipe_jax.profiling.measured_plan import plan_slices
from tpipe_jax.reporting.console import Console
from tpipe_jax.reporting.loss_plot import LoggedLine, read_metrics
from tpipe_jax.runtime.jax_options import needed
from tpipe_jax.training.memory import fitting_step
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import TrainState, abstract_rows, init_state
from tpipe_jax.training.step import checked_rows

Devices = Sequence[jax.Device]

KEEP = "copy {} to tokenizer.json in the run's folder"


@needed()
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

    @needed()
    def init(self) -> TrainState:
        """Returns fresh parameters and optimiser state, drawn with config.train.seed."""
        return init_state(self._spec, self._optimizer)

    @needed()
    def __call__(
        self, state: TrainState, rows: np.ndarray | Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """Returns the next state, and the metrics as scalars: `loss` (nats per token), `grad_norm`
        and others.

        `data.rows.RowLayout` describes the rows, int32 `[B, ...]`. Tokens are below the
        vocabulary's size; a target may also be `config.IGNORE`. The old state is donated, so it
        cannot be used again. Raises `UserError` if the rows have another shape or type, and, unless
        they are jax's and on devices already, if a number in them is neither of these.
        """
        like = abstract_rows(self._spec)
        rows = rows if isinstance(rows, Array) else np.asarray(rows)
        if rows.shape != like.shape:
            raise UserError(
                f"rows of shape {rows.shape} must be of {like.shape}, as the config is."
            )
        if isinstance(rows, np.ndarray):
            rows = put_rows(self.mesh, checked_rows(self.config, rows))
        elif not np.can_cast(rows.dtype, np.int32):
            raise UserError(f"rows of type {rows.dtype} must be int32, as jax has token ids.")
        else:
            rows = jax.device_put(rows.astype(like.dtype), like.sharding)
        state, metrics = self._step(state, rows)
        # If devices of a process fall many steps behind, they may wait for each other for ever.
        jax.block_until_ready(self._last)
        self._last = metrics
        return state, metrics


@needed()
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
    check_plan_serves("the plan", slices, config)
    return TrainStep(spec, slices)


@needed()
def train(config: Config, workdir: Path | str, devices: Devices | None = None) -> list[LoggedLine]:
    """Plans, trains, evaluates and saves, as `tpipe train` does in one process. Goes on where an
    earlier call has stopped.

    Returns the history of the run: the lines of its metrics.jsonl, each with `step`, `loss` and
    others (docs/metrics.md).
    """
    run_training(config, Path(workdir), devices or _devices(config.mesh), Console())
    has_logged = (Path(workdir) / "metrics.jsonl").exists()  # not if it was stopped before a step
    return read_metrics(Path(workdir)) if has_logged else []


class Model:
    """The trained model of a run, on a mesh.

    `spec`, `params`, `step`, `config` and `mesh` say what it is. `trained` has them for the
    functions of this package.
    """

    def __init__(self, trained: Trained, workdir: Path) -> None:
        self.trained, self._workdir = trained, workdir
        self.spec, self.params, self.step = trained
        self.config, self.mesh = trained.config, trained.mesh

    @cached_property
    def _generator(self) -> Generator:
        return Generator(self.spec, self.params)

    @needed()
    def generate(
        self,
        prompt: str,
        max_tokens: int = 200,
        temperature: float = 0.7,
        top_p: float = 1.0,
        seed: int = 0,
        top_k: int | None = None,
        stop_at_end: bool = True,
    ) -> str:
        """Returns the text that the model adds to a prompt.

        Reads and writes text with the tokenizer of the run. Temperature 0 always takes the most
        likely token. Otherwise tokens are drawn, with this seed, from the `top_k` most likely ones,
        and of these from the most likely ones that together have a probability of `top_p`. Stops
        before the token that ends a document, if `stop_at_end` is set. Raises `UserError` if the
        prompt is empty, or longer than the model's `seq_len`, or if the run was trained on tokens
        of an unknown tokenizer.
        """
        tokenizer = tokenizer_of(self._workdir, remedy=KEEP)
        remedy = "name its own in data.tokenizer of the run's config.json"
        tokens = encode_prompt("prompt", prompt, tokenizer, self.config.model, remedy)
        choose = chooser(temperature, top_p, seed, top_k)
        following = self._generator.tokens_after(tokens, choose)
        ends = ends_of(self._workdir, tokenizer) if stop_at_end else set()
        return "".join(tokenizer.stream(until_end(following, ends, max_tokens), tokens))

    @needed()
    def logits(self, tokens: np.ndarray | Sequence[Any]) -> np.ndarray:
        """Returns the logits after each token, float32 `[B, L, V]`, or `[L, V]` for `[L]`.

        L is at most the model's `seq_len`. Raises `UserError` if the tokens are not of the model.
        """
        tokens_BL, model = np.atleast_2d(np.asarray(tokens)), self.config.model
        is_whole = np.issubdtype(tokens_BL.dtype, np.integer) and tokens_BL.ndim == 2
        if not (is_whole and len(tokens_BL) and 1 <= tokens_BL.shape[1] <= model.seq_len):
            raise UserError(
                f"tokens of shape {tokens_BL.shape} and type {tokens_BL.dtype} must be whole "
                f"numbers [B, L], with L from 1 to config.model.seq_len={model.seq_len}."
            )
        if not ((tokens_BL >= 0) & (tokens_BL < model.vocab_size)).all():
            raise UserError(f"tokens must be from 0 to {model.vocab_size - 1}.")
        logits_BLV = self._generator.logits(tokens_BL)
        return logits_BLV if np.ndim(tokens) > 1 else logits_BLV[0]

    @needed()
    def evaluate(self, data: Path | str | None = None) -> Evaluation:
        """Returns the loss on all of some data, named as in `config.data.train`, or on what the run
        holds out. Raises `UserError` if the data cannot be read as tokens of the model, or if a
        run that is not the user's own names them.
        """
        path, named = self._workdir / RUN_FILE, {"data.tokenizer": KEEP}
        if data is None:
            named |= dict.fromkeys(("data.train", "data.eval"), "call evaluate({})")
        if path.exists():
            check_named(path, self.config, named)
        if data is None:
            config, shares = open_held_out(self.config)
            return evaluate(self.trained.with_config(config), shares)
        size = self.config.model.vocab_size
        return evaluate(self.trained, open_shares("data", str(data), size, self.config.data))

    def save(self, folder: Path | str) -> None:
        """Writes a folder that `transformers` loads, with the tokenizer of the run. Raises
        `UserError` if the folder is not empty, or if no class there computes what the model does.
        """
        convert.export_model(self._workdir, Path(folder), self.step)


@needed()
def import_model(folder: Path | str, workdir: Path | str, seq_len: int | None = None) -> Config:
    """Makes a workdir with the weights of a Hugging Face folder as its step 0. Returns its config,
    with the model, the tokenizer and a learning rate for tuning.

    `seq_len` replaces the longest sequence that the folder names. Raises `UserError` if the folder
    has no model of a family here, or if the workdir is not empty.
    """
    return convert.import_model(Path(folder), Path(workdir), seq_len)


@needed()
def load(
    workdir: Path | str,
    step: int | None = None,
    config: Config | None = None,
    devices: Devices | None = None,
) -> Model:
    """Loads the model of a run's newest sound checkpoint, or of `step`, onto a mesh.

    The given config says how the model is laid out, with `mesh` and `precision`, and
    `train.batch_size` how many sequences an evaluation takes at once. The model itself is the
    checkpoint's, and the data settings are the run's. If the run has a block of its own, which is
    code, `config.model.block` has to name it.
    """
    config = config or Config()
    path = Path(workdir) / RUN_FILE
    if path.exists():
        config = replace(config, data=with_kept_tokenizer(load_config(path).data, path.parent))
    devices = devices or _devices(config.mesh)
    return Model(load_trained(Path(workdir), step, config, devices), Path(workdir))


def _devices(mesh: MeshConfig) -> Devices:
    try:
        devices = find_devices(mesh)
        return devices if mesh.auto else devices[: mesh.num_devices]
    except RuntimeError:  # jax has been used before, so its devices are fixed
        return jax.devices()[: mesh.num_devices]
