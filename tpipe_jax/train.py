"""The training loop: everything that a run does, in the order in which it does it."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from jax.stages import Compiled

from tpipe_jax.autoplan import as_first, plan_slices, stage_factors
from tpipe_jax.backends import resolve_attention
from tpipe_jax.checkpoint import Checkpoints
from tpipe_jax.collectives import compile_checked
from tpipe_jax.config import BYTES, BYTES_NAME, Config, resolved
from tpipe_jax.console import Console
from tpipe_jax.data import Batches, open_data
from tpipe_jax.failures import Expect, watched
from tpipe_jax.generate import Generator, chooser
from tpipe_jax.memory import budget, fitting_step, limit_bytes, out_of_memory, program_bytes
from tpipe_jax.mesh import (
    check_model,
    host_parts,
    layer_counts,
    make_mesh,
    operators_span_hosts,
    put_read_rows,
)
from tpipe_jax.metrics import Metrics
from tpipe_jax.model import Params, num_params
from tpipe_jax.optim import make_optimizer
from tpipe_jax.plan import Plan, PlanRequest, read_settings
from tpipe_jax.precision import is_slow, resolve_precision
from tpipe_jax.processes import gathered, host_names
from tpipe_jax.read_ahead import ReadAhead
from tpipe_jax.remat import candidates
from tpipe_jax.schedule import terapipe
from tpipe_jax.step_log import StepLog
from tpipe_jax.stop import Stop, Stopped
from tpipe_jax.ticks import check_trace, gathered_ticks, traced
from tpipe_jax.tokenizer import open_tokenizer
from tpipe_jax.train_state import TrainState, abstract_rows, abstract_state, init_state
from tpipe_jax.train_step import make_loss
from tpipe_jax.workdir import changed_settings, describe_in_files, locked

StepResult = tuple[TrainState, dict[str, Array]]

TEMPERATURE = 0.7  # of the sample at the end
PHASE_SECONDS = 3600  # that planning, compiling or restoring may take, if steps may not take more


class Within(Protocol):
    """Says what is done from now on, and that it may not take longer than the settings allow."""

    def __call__(self, what: str, is_step: bool = True) -> None: ...


@dataclass(frozen=True)
class Run:
    """What a run is made of, found to fit together."""

    config: Config
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
    mesh = make_mesh(config.mesh, devices)
    config = resolve_attention(resolve_precision(config, mesh), mesh)
    check_model(config.model, config.mesh)
    candidates(config.memory)
    check_trace(config)
    plan = read_settings(config)
    train_data, held_out = open_data(config)
    for batches in (train_data, held_out):
        batches.batch(0, slice(8))  # a vocabulary of another size mostly shows here
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    return Run(config, mesh, plan, train_data, held_out, optimizer)


def train(config: Config, workdir: Path, devices: Sequence[jax.Device], console: Console) -> None:
    """Trains to the last step or until interrupted, from the last checkpoint in the workdir.

    Nothing is written before settings, data and checkpoint have been found to fit each other. Then
    the slices are planned, which may take a minute of measuring, and training starts. Raises
    `UserError` where they don't fit.
    """
    run = prepare(resolved(config), devices)
    config = run.config
    is_first = jax.process_index() == 0  # which alone writes, but for checkpoints
    console.show_facts(_facts(run))
    if is_slow(config.precision, run.mesh):
        console.say(
            "CPUs compute float16 in float32 and convert it back and forth, which is slow: "
            "config.precision.compute=float32 is faster here."
        )
    for change in changed_settings(config, workdir) if is_first else ():
        console.say(f"changed since the last start: {change}")
    _show_hosts(run.mesh, console)  # all meet here, after the first has found the folder fit

    with (
        out_of_memory(),
        watched() as expect,
        Stop(console.say) as stop,
        locked(workdir / "checkpoints") if is_first else nullcontext(),
        Checkpoints(
            workdir / "checkpoints", config.checkpoint, config.model, console.say
        ) as checkpoints,
    ):
        within = partial(_expect, config, expect)
        outcome = _train(run, workdir, console, checkpoints, stop, within)
    console.say(outcome)


def _train(
    run: Run,
    workdir: Path,
    console: Console,
    checkpoints: Checkpoints,
    stop: Stop,
    within: Within,
) -> str:
    """Plans, compiles and runs the steps that are left; returns what the run has come to."""
    config, num_steps, first_step = run.config, run.config.train.num_steps, 0
    try:
        within("checking checkpoints", is_step=False)
        saved_step = checkpoints.newest_step()
        first_step = saved_step or 0
        if first_step >= num_steps:
            return (
                f"The run in {workdir} has finished its {first_step} steps: go further with "
                f"--config.train.num-steps={2 * first_step}, or start another with --workdir."
            )
        stop.check()
        within("planning slices", is_step=False)
        plan = _planned(run, workdir, console, stop.check)
        within("compiling", is_step=False)
        programs = compile_programs(run, plan, console)
        stop.check()
    except Stopped:
        return f"Interrupted after step {first_step}: the same command goes on."
    within("preparing the state", is_step=False)
    state = _first_state(run, checkpoints, saved_step, console)
    # Read now, since a process that cannot read one later would leave the others waiting.
    held_out = [_put_batch(run, run.held_out, i) for i in range(config.train.eval_batches)]
    evaluate = partial(_evaluate, programs.loss, held_out, within)
    metrics = None
    if jax.process_index() == 0:
        describe_in_files(config, workdir, plan, stage_factors(config))
        metrics = Metrics(workdir, first_step)
    with closing(metrics) if metrics else nullcontext():
        log = StepLog(config, plan, metrics, console)
        gathered("training", "", lambda _: "")  # so that nobody's first step waits for others
        with console.progress(first_step, num_steps):
            step, state = _loop(
                run,
                programs.train_step,
                partial(_trace, run, workdir, plan, programs.train_step, console),
                evaluate,
                state,
                first_step,
                checkpoints,
                log,
                stop,
                within,
            )
    if step < num_steps:
        return f"Interrupted after step {step}: the same command continues from here."
    if config.train.sample_tokens:
        within("sampling", is_step=False)
        _show_sample(run, state.params, stop, console)
    return f"Trained {num_steps} steps; everything is in {workdir}."


def _facts(run: Run) -> dict[str, str]:
    """What there is to know of a run before it starts, by a short name."""
    config, model, mesh = run.config, run.config.model, run.config.mesh
    counts = layer_counts(model.num_layers, mesh.pipe)
    per_stage = f"{min(counts)}" + f"-{max(counts)}" * (min(counts) < max(counts))
    return {
        "model": f"{num_params(model):,} parameters: {model.num_layers} layers, width "
        f"{model.d_model}, {model.num_heads} heads, vocabulary {model.vocab_size}, "
        f"{config.precision.compute}",
        "mesh": f"data {mesh.data} x pipe {mesh.pipe} x model {mesh.model} = {mesh.num_devices} "
        f"devices ({run.mesh.devices.flat[0].device_kind}), {per_stage} layers a stage",
        "data": f"{run.train_data.num_tokens:,} tokens to train on, "
        f"{run.held_out.num_tokens:,} held out ({', '.join(run.train_data.formats)})",
        "step": f"{config.train.batch_size} sequences of {model.seq_len} tokens, "
        f"{run.plan.batch_size} a data shard",
    }


def _show_hosts(mesh: Mesh, console: Console) -> None:
    hosts = host_names()
    console.show_hosts(host_parts(mesh, hosts))
    if operators_span_hosts(mesh, hosts):
        console.say(
            "Some operators are shared by devices of several hosts, which may be slow: let "
            "config.mesh.model divide the devices of a host, and config.mesh.order end in model."
        )


def _planned(run: Run, workdir: Path, console: Console, check: Callable[[], None]) -> Plan:
    """The plan as given, or the fastest of those that keep to what is."""
    config = run.config
    if isinstance(run.plan, PlanRequest):
        _, planning = plan_slices(config, run.plan, run.mesh, workdir, console, check)
        console.show_planning(planning, stage_factors(config))
        return planning.plan
    plan = as_first(run.plan)
    console.show_plan(plan, stage_factors(config))
    return plan


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
    config, train_step = fitting_step(run.config, run.mesh, plan, run.optimizer)
    params = abstract_state(config, run.mesh, run.optimizer).params
    loss = compile_checked(
        make_loss(config, run.mesh, terapipe(plan)),
        run.mesh,
        params,
        abstract_rows(config, run.mesh),
    )
    console.say(f"compiled in {time.monotonic() - start:.0f} s")
    console.show_budget(
        budget(config, run.mesh, run.optimizer),
        config.memory.remat,
        program_bytes(train_step),
        limit_bytes(config, run.mesh),
    )
    return Programs(train_step, loss)


def _first_state(
    run: Run, checkpoints: Checkpoints, saved_step: int | None, console: Console
) -> TrainState:
    """That of the checkpoint, if there is one, or a fresh one."""
    if saved_step is None:
        return init_state(run.config, run.mesh, run.optimizer)
    like = abstract_state(run.config, run.mesh, run.optimizer)
    state = checkpoints.restore(saved_step, like)
    after = f"continuing after step {saved_step}"
    console.say(after if saved_step else "starting from imported weights")
    return state


def _expect(config: Config, expect: Expect, what: str, is_step: bool = True) -> None:
    seconds = config.train.step_timeout_seconds
    if not is_step:
        seconds = max(seconds, PHASE_SECONDS)
    expect(
        f"error: {what} has taken longer than {seconds} s: a device, a disk or another process "
        "hangs, or config.train.step_timeout_seconds is too short for it; the same command "
        "continues from the last checkpoint.",
        seconds,
    )


def _loop(
    run: Run,
    train_step: Compiled,
    trace: Callable[[int, TrainState, Array], tuple[StepResult, float]],
    evaluate: Callable[[Params], float],
    state: TrainState,
    first_step: int,
    checkpoints: Checkpoints,
    log: StepLog,
    stop: Stop,
    within: Within,
) -> tuple[int, TrainState]:
    """Runs the steps; returns how many are done, and saved, and the state.

    Where data cannot be read the steps before it are done, and saved if all processes can be told
    in time. Raises `UserError` then.
    """
    config, num_steps = run.config, run.config.train.num_steps
    read = partial(_put_batch, run, run.train_data)
    batches = ReadAhead(read, first_step, num_steps, stop.request)

    step = first_step
    with closing(batches):
        log.start()
        while step < num_steps and not stop.is_due():
            within(f"step {step + 1}")
            step, rows = step + 1, batches.take()
            if step == config.train.trace_step:
                log.finish()  # so that the trace has nothing of the step before
                (state, values), extra_seconds = trace(step, state, rows)
                log.leave_out(extra_seconds)
            else:
                state, values = train_step(state, rows)
                log.finish()  # the step before, which this one follows without a pause
            log.begin(step, values)
            if step % config.train.eval_every == 0 or step == num_steps:
                log.finish(partial(evaluate, state.params))
            if step % config.checkpoint.every == 0:
                log.finish()  # a step is logged before it is saved, so that no kill loses its line
                within(f"saving step {step}")
                log.add_save(checkpoints.save(step, state))
            checkpoints.raise_failure(config.train.step_timeout_seconds)
        within(f"step {step}")
        log.finish()
    within(f"saving step {step}")
    if step > first_step:
        checkpoints.save(step, state)
    checkpoints.wait()  # before the run says what it has come to
    batches.raise_failure()
    return step, state


def _trace(
    run: Run,
    workdir: Path,
    plan: Plan,
    train_step: Compiled,
    console: Console,
    step: int,
    state: TrainState,
    rows: Array,
) -> tuple[StepResult, float]:
    """Runs a step, and adds its ticks to timeline.json; returns what the step gives, and what that
    took beside it, seconds.
    """
    start, text = time.monotonic(), train_step.as_text() or ""
    run_step = partial(train_step, state, rows)
    result, boxes, seconds = traced(run_step, text, terapipe(plan), run.mesh)
    console.say(f"step {step} was traced: {gathered_ticks(boxes, workdir, plan, step)}")
    return result, time.monotonic() - start - seconds


def _put_batch(run: Run, batches: Batches, index: int) -> Array:
    """Puts a batch on the mesh, of which each process reads what its data shards need."""
    shape = run.config.train.batch_size, run.config.model.seq_len + 1
    return put_read_rows(run.mesh, partial(batches.batch, index), shape, np.int32)


def _evaluate(
    loss: Callable[[Params, Array], Array],
    held_out: Sequence[Array],
    within: Within,
    params: Params,
) -> float:
    """The mean loss of the batches, nats per token."""
    losses = []
    for i, rows in enumerate(held_out):
        within(f"batch {i + 1} of an evaluation")
        losses.append(float(loss(params, rows)))
    return float(np.mean(losses))


def _show_sample(run: Run, params: Params, stop: Stop, console: Console) -> None:
    """How the model continues a held-out text."""
    config = run.config
    prompt = run.held_out.batch(0)[-1, : max(1, config.model.seq_len // 2)]
    num_tokens = config.train.sample_tokens
    choose = chooser(TEMPERATURE, seed=config.train.seed)
    following = Generator(config, run.mesh, params).tokens_after(prompt, choose)
    tokens = [next(following)]
    while len(tokens) < num_tokens and not stop.is_due():
        tokens.append(next(following))
    console.show_sample(*(_as_text(config, part) for part in (prompt, np.array(tokens))))


def _as_text(config: Config, tokens: np.ndarray) -> str:
    """As the text that they are, without control characters; as numbers where that is unknown."""
    name = config.data.tokenizer
    if name != BYTES_NAME or config.model.vocab_size == BYTES:
        text = open_tokenizer("config.data.tokenizer", name).decode(tokens.tolist())
        return "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
        )
    return " ".join(map(str, tokens))
