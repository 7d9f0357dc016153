"""The training loop: everything that a run does, in the order in which it does it."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from tpipe_jax.checkpoint import Checkpoints
from tpipe_jax.config import Config, UserError, from_dict, to_dict
from tpipe_jax.console import Console
from tpipe_jax.data import Batches, open_data
from tpipe_jax.mesh import check_model, make_mesh, put_rows
from tpipe_jax.metrics import Metrics
from tpipe_jax.model import Params, forward_flops
from tpipe_jax.optim import learning_rate, make_optimizer
from tpipe_jax.plan import Plan, make_plan
from tpipe_jax.sample import sample
from tpipe_jax.schedule import Schedule, terapipe
from tpipe_jax.timeline import draw_timeline
from tpipe_jax.train_state import TrainState, abstract_state, init_state
from tpipe_jax.train_step import make_loss, make_train_step


def train(config: Config, workdir: Path, devices: Sequence[jax.Device], console: Console) -> None:
    """Trains to the last step or until interrupted, from the last checkpoint in the workdir.

    Nothing is written before settings, data and checkpoint have been found to fit each other.
    Raises `UserError` where they don't.
    """
    mesh = make_mesh(config.mesh, devices)
    check_model(config.model, config.mesh)
    plan = make_plan(config)
    schedule = terapipe(plan)
    train_data, held_out = open_data(config)
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    first_rows = put_rows(mesh, train_data.batch(0))
    prompt = held_out.batch(0)[-1, : config.model.seq_len // 2]
    num_tokens = train_data.num_tokens, held_out.num_tokens
    console.describe_run(config, mesh, plan, schedule, num_tokens)

    _check_workdir(workdir)
    identity = {name: to_dict(config)[name] for name in ("model", "mesh")}
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, identity)
    first_step, state = _restore_or_init(config, mesh, optimizer, checkpoints)
    num_steps = config.train.num_steps
    if first_step >= num_steps:
        console.say(
            f"The run in {workdir} has finished its {first_step} steps: go further with "
            f"--config.train.num-steps={2 * first_step}, or start another with --workdir."
        )
        return
    if first_step:
        console.say(f"continuing after step {first_step}")
    _describe_in_files(config, workdir, plan, schedule)

    start = time.monotonic()
    train_step = (
        make_train_step(config, mesh, schedule, optimizer).lower(state, first_rows).compile()
    )
    console.say(f"compiled in {time.monotonic() - start:.0f} s")
    evaluate = partial(_evaluate, config, mesh, make_loss(config, mesh, schedule), held_out)

    step = first_step
    with (
        interruptions() as interrupted,
        closing(checkpoints),
        closing(Metrics(workdir, first_step)) as metrics,
        console.progress(first_step, num_steps),
    ):
        log = StepLog(config, metrics, console)
        while step < num_steps and not interrupted():
            step += 1
            state, values = train_step(state, put_rows(mesh, train_data.batch(step - 1)))
            log.finish()  # the step before, which this one follows without a pause
            log.begin(step, values)
            if step % config.train.eval_every == 0 or step == num_steps:
                log.finish(partial(evaluate, state.params))
            if step % config.checkpoint.every == 0 or step == num_steps or interrupted():
                log.finish()  # a step is logged before it is saved, so that no kill loses its line
                checkpoints.save(step, state)
        log.finish()
    if step < num_steps:
        console.say(
            f"Interrupted and saved after step {step}: the same command continues from here."
        )
        return
    if config.train.sample_tokens:
        tokens = sample(config, mesh, plan, state.params, prompt, config.train.sample_tokens)
        console.show_sample(*(_as_text(config, part) for part in (prompt, tokens)))
    console.say(f"Trained {num_steps} steps; everything is in {workdir}.")


class StepLog:
    """Measures steps and passes on what was due: a step is begun when it has been dispatched.

    `step_seconds` is the mean over the steps since the last line, without evaluations.
    """

    def __init__(self, config: Config, metrics: Metrics, console: Console) -> None:
        self._train, self._metrics, self._console = config.train, metrics, console
        self._tokens_per_step = config.train.batch_size * config.model.seq_len
        self._learning_rate = learning_rate(config.optim, config.train.num_steps)
        self._running: tuple[int, dict[str, Array]] | None = None
        self._num_timed, self._since = 0, time.monotonic()

    def begin(self, step: int, values: dict[str, Array]) -> None:
        self._running = step, values

    def finish(self, evaluate: Callable[[], float] | None = None) -> None:
        """Waits for the step that was begun, if there is one, and logs it if it is due."""
        if self._running is None:
            return
        (step, values), self._running = self._running, None
        values = jax.device_get(values)
        line = {name: float(values[name]) for name in ("loss", "grad_norm")}
        self._num_timed += 1
        if not (evaluate or step % self._train.log_every == 0 or step == self._train.num_steps):
            return
        step_seconds = (time.monotonic() - self._since) / self._num_timed
        line |= {
            "learning_rate": np.asarray(self._learning_rate(step - 1)).item(),
            "step_seconds": step_seconds,
            "tokens_per_second": self._tokens_per_step / step_seconds,
        }
        if evaluate:
            line["eval_loss"] = evaluate()
        self._metrics.write(step, line)
        self._console.show_progress(step, line)
        self._num_timed, self._since = 0, time.monotonic()


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C or SIGTERM has come; a second one stops the program at once."""
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _restore_or_init(
    config: Config, mesh: Mesh, optimizer: optax.GradientTransformation, checkpoints: Checkpoints
) -> tuple[int, TrainState]:
    if checkpoints.latest_step() is None:
        return 0, init_state(config, mesh, optimizer)
    return checkpoints.restore(abstract_state(config, mesh, optimizer))


def _evaluate(
    config: Config,
    mesh: Mesh,
    loss: Callable[[Params, Array], Array],
    held_out: Batches,
    params: Params,
) -> float:
    batches = range(config.train.eval_batches)
    return float(np.mean([float(loss(params, put_rows(mesh, held_out.batch(i)))) for i in batches]))


def _check_workdir(workdir: Path) -> None:
    """Refuses a folder with a config.json that is not of a run, since it would be overwritten."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        from_dict(json.loads(path.read_text()))
    except (UserError, ValueError, OSError) as error:
        raise UserError(
            f"--workdir={workdir} has a config.json that is not of a run ({error}): "
            "choose another folder."
        ) from error


def _describe_in_files(config: Config, workdir: Path, plan: Plan, schedule: Schedule) -> None:
    """Writes config.json, plan.json and timeline.png."""
    try:
        (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        plan.save(workdir / "plan.json")
        cost = [
            item.num_rows * forward_flops(config.model, item.num_tokens, item.token) / 1e9
            for item in schedule.items
        ]
        title = (
            f"{len(schedule.items)} slices (sequences x tokens) on {schedule.num_stages} stages, "
            "as wide as their floating-point operations"
        )
        path = workdir / "timeline.png"
        draw_timeline(path, schedule, cost, [2 * c for c in cost], title, "GFLOP in a layer")
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={workdir} ({error.strerror}: {error.filename}): make it "
            "writable, or choose another folder."
        ) from error


def _as_text(config: Config, tokens: np.ndarray) -> str:
    """Byte tokens as the text they are, others as numbers."""
    if config.model.vocab_size == 256:
        return tokens.astype(np.uint8).tobytes().decode(errors="replace")
    return " ".join(map(str, tokens))
