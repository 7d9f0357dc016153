"""A whole run, from start to end: `tpipe train`."""

import math
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tpipe_jax.checkpoint.checkpoints import Checkpoints
from tpipe_jax.checkpoint.manifest import finish_times
from tpipe_jax.commands.generate import Generator, chooser
from tpipe_jax.config.invocation import command
from tpipe_jax.config.own_runs import CHECKPOINTS
from tpipe_jax.config.paths import expanded
from tpipe_jax.config.settings import BYTES, BYTES_NAME, Config
from tpipe_jax.data.carried import (
    check_kept_tokenizer,
    keep_tokenizer,
    with_carried,
    with_kept_tokenizer,
)
from tpipe_jax.data.rows import RowLayout
from tpipe_jax.data.tokenizer import open_tokenizer
from tpipe_jax.devices.mesh import host_parts, operators_span_hosts
from tpipe_jax.devices.precision import is_slow
from tpipe_jax.errors import Infeasible, brief
from tpipe_jax.files import writing_to
from tpipe_jax.model.block import Params
from tpipe_jax.model.transformer import num_params
from tpipe_jax.planning.placement import layer_counts
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.settings import settled, work_factors
from tpipe_jax.profiling.measured_plan import as_first, plan_slices
from tpipe_jax.profiling.mesh_search import choose_mesh, take_latencies
from tpipe_jax.reporting.console import Console, count
from tpipe_jax.reporting.metrics import Metrics
from tpipe_jax.reporting.prometheus import newest_age
from tpipe_jax.reporting.step_profile import ProfiledSteps
from tpipe_jax.reporting.stragglers import Stragglers
from tpipe_jax.reporting.workdir import (
    changed_settings,
    describe_in_files,
    left_as_found,
    note_config,
    run_lock,
)
from tpipe_jax.runtime.failures import watched
from tpipe_jax.runtime.processes import gathered, host_names
from tpipe_jax.runtime.stop import MEASURING, TRAINING, Stop, Stopped
from tpipe_jax.training.comparison import compare
from tpipe_jax.training.loop import Loop, put_batch
from tpipe_jax.training.memory import out_of_memory
from tpipe_jax.training.prepare import Programs, Run, check_inputs, compile_programs, prepare
from tpipe_jax.training.services import Services
from tpipe_jax.training.state import TrainState, abstract_state, init_state
from tpipe_jax.training.step_log import StepLog

TEMPERATURE = 0.7  # of the sample at the end


class Ending(NamedTuple):
    """How a run has ended."""

    sentence: str
    num_steps: int | None = None
    """Steps that are done, if all are."""
    status: int = 0
    """Exit status: not 0 if some steps are left."""


def train(
    config: Config,
    workdir: Path,
    devices: Sequence[jax.Device],
    console: Console,
    profiled: range | None = None,
) -> Ending:
    """Trains from the last checkpoint in the workdir to the last step, or until interrupted, and
    takes a profile of the `profiled` steps.

    First checks that settings, data and checkpoint fit each other; until then it writes no results
    except the measurements that choose a mesh. Then plans the slices, which may take a minute of
    measuring, and trains. Raises `UserError` if something does not fit.
    """
    config, carried = with_carried(config)
    if not os.path.exists(expanded("config.data.tokenizer", config.data.tokenizer)):
        config = replace(config, data=with_kept_tokenizer(config.data, workdir))
    if carried:
        console.say(carried)
    with out_of_memory(), watched() as expect, Stop(console.say, MEASURING) as stop:
        services = Services(console, stop, expect, config.train.step_timeout_seconds)
        if config.mesh.auto:
            check_inputs(config)

            def check() -> None:
                services.within("choosing a mesh", is_step=False)
                stop.check()

            try:
                config = choose_mesh(config, devices, workdir, console, check)
            except Stopped:
                sentence = "Interrupted before a mesh was chosen: the same command goes on."
                console.say(sentence)
                return Ending(sentence, status=stop.status())
            take_latencies(config.mesh, workdir)
            expect("", math.inf)  # no time limit until the run says what it does next
        ending = _run(config, workdir, devices, services, profiled)
        console.say(ending.sentence)
        return ending


def _run(
    config: Config,
    workdir: Path,
    devices: Sequence[jax.Device],
    services: Services,
    profiled: range | None,
) -> Ending:
    """Trains on a given mesh."""
    run, console = prepare(config, devices), services.console
    config = run.config
    is_first = jax.process_index() == 0  # only process 0 writes, except checkpoints
    console.show_facts(_facts(run))
    for note in dict.fromkeys([*run.train_data.notes, *run.held_out.notes, *_warnings(config)]):
        console.say(note)
    if is_slow(config.precision, run.spec.device):
        console.say(
            "CPUs compute float16 in float32 and convert it back and forth, which is slow: "
            "config.precision.compute=float32 is faster here."
        )
    if is_first:
        check_kept_tokenizer(config.data, workdir)
    for change in changed_settings(run.described, workdir) if is_first else ():
        console.say(f"changed since the last start: {change}")
    _show_hosts(run.mesh, console)  # all processes wait here until process 0 has checked the folder

    with (
        left_as_found(workdir / "checkpoints"),
        run_lock(workdir / "checkpoints") if is_first else nullcontext(),
        Checkpoints(
            workdir / "checkpoints", config.checkpoint, config.model, console.say
        ) as checkpoints,
    ):
        return _train(run, workdir, checkpoints, services, profiled)


def _train(
    run: Run,
    workdir: Path,
    checkpoints: Checkpoints,
    services: Services,
    profiled: range | None,
) -> Ending:
    """Plans, compiles and runs the steps that are left."""
    console, stop, within = services.console, services.stop, services.within
    config, num_steps, first_step = run.config, run.config.train.num_steps, 0
    try:
        within("checking checkpoints", is_step=False)
        saved_step = checkpoints.newest_step()
        first_step = saved_step or 0
        if first_step >= num_steps:
            sentence = (
                f"The run in {workdir} has finished its {first_step} steps: go further with "
                f"--config.train.num-steps={2 * first_step}, or start another with --workdir."
            )
            return Ending(sentence, first_step)
        _continue_data(run, checkpoints, saved_step, console)
        stop.check()
        within("planning slices", is_step=False)
        plan = _planned(run, workdir, console, stop.check)
        run = replace(run, spec=run.spec.with_config(settled(config, plan)))
        config, checkpoints.num_chunks = run.config, plan.num_chunks
        within("compiling", is_step=False)
        programs = compile_programs(run, plan, console)
        stop.check()
    except Stopped:
        sentence = f"Interrupted after step {first_step}: the same command goes on."
        return Ending(sentence, status=stop.status())
    stop.answer = TRAINING
    if profiled and first_step >= profiled[-1]:
        console.say(f"no profile is taken, since steps {profiled[0]} to {profiled[-1]} are done")
    within("preparing the state", is_step=False)
    state = _first_state(run, checkpoints, saved_step, console)
    # Read now: if a process could not read one later, the others would wait for it.
    held_out = [put_batch(run, run.held_out, i) for i in range(config.train.eval_batches)]
    metrics = None
    if jax.process_index() == 0:
        with writing_to(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            keep_tokenizer(config.data, workdir)
        describe_in_files(run.described, workdir, plan, work_factors(config, plan))
        age = newest_age(partial(finish_times, workdir / CHECKPOINTS))
        metrics = Metrics(workdir, first_step, config, age)
    else:
        note_config(run.described, workdir)
    with closing(metrics) if metrics else nullcontext():
        log = StepLog(run.spec, plan, metrics, console)
        recorded = ProfiledSteps(profiled, workdir / "profile")
        watched = _stragglers(run)
        loop = Loop(run, plan, programs, workdir, checkpoints, log, recorded, services, watched)
        gathered("training", "", lambda _: "")  # so that no first step waits for another process
        with console.progress(first_step, num_steps):
            step, state = loop.steps(state, first_step, held_out)
    return _ending(run, plan, programs, workdir, step, state, services)


def _stragglers(run: Run) -> Stragglers | None:
    """Returns what watches the stages, if the settings ask for it. All processes call it."""
    if not run.config.metrics.stage_times_every or run.config.mesh.pipe == 1:
        return None
    hosts = host_names()
    names = {
        place: f"{hosts[device.process_index]}, process {device.process_index}"
        for place, device in np.ndenumerate(run.mesh.devices[:, :, 0])
    }
    layers = [sum(own) for own in zip(*run.spec.chunk_layers, strict=True)]
    return Stragglers(layers, names)


def _ending(
    run: Run,
    plan: Plan,
    programs: Programs,
    workdir: Path,
    step: int,
    state: TrainState,
    services: Services,
) -> Ending:
    """Shows what the model has learnt and what token slices gain, if all steps are done. The state
    cannot be used any more.
    """
    config, num_steps = run.config, run.config.train.num_steps
    console, stop, within = services.console, services.stop, services.within
    if step < num_steps:
        block = config.model.block
        named = ""
        if config.model.has_own_block:
            named = f" --config.model.block={shlex.quote(block)}"
        return Ending(
            f"Interrupted after step {step}: the same command continues from here, and so does\n"
            f"    {command('train')} --workdir={shlex.quote(str(workdir))}{named}",
            status=stop.status(),
        )
    if config.train.sample_tokens:
        within("sampling", is_step=False)
        _show_sample(run, state.params, stop, console)
    if config.train.compare_steps and not stop.is_due():
        within("comparing with whole sequences", is_step=False)
        _show_comparison(run, plan, programs, state, services)
    steps = count(num_steps, "step")
    return Ending(f"Trained {steps}; everything is in {workdir}.", num_steps)


def _facts(run: Run) -> dict[str, str]:
    """Returns facts on a run before it starts, as text by a short name."""
    config, model, mesh = run.config, run.config.model, run.config.mesh
    counts = layer_counts(model.num_layers, mesh.pipe)
    per_stage = f"{min(counts)}" + f"-{max(counts)}" * (min(counts) < max(counts))
    return {
        "model": f"{num_params(model):,} parameters: {count(model.num_layers, 'layer')}, width "
        f"{model.d_model}, {count(model.num_heads, 'head')}, vocabulary {model.vocab_size}, "
        f"{config.precision.compute}",
        "mesh": f"data {mesh.data} x pipe {mesh.pipe} x model {mesh.model} = "
        f"{count(mesh.num_devices, 'device')} ({run.spec.device.kind}), "
        f"{per_stage} layer{'s' * (max(counts) != 1)} a stage",
        "data": f"{run.train_data.num_tokens:,} tokens to train on, "
        f"{run.held_out.num_tokens:,} held out ({', '.join(run.train_data.formats)})",
        "step": f"{count(config.train.batch_size, 'sequence')} of "
        f"{count(model.seq_len, 'token')}, "
        f"{run.plan.batch_size} a data shard",
    }


def _warnings(config: Config) -> list[str]:
    """Returns lines on settings that are allowed, and are rarely what is meant."""
    found, train, optim = [], config.train, config.optim
    if optim.warmup_steps >= train.num_steps:
        found.append(
            f"config.optim.warmup_steps={optim.warmup_steps} is not less than "
            f"config.train.num_steps={train.num_steps}, so the learning rate never reaches "
            f"config.optim.learning_rate={optim.learning_rate:g}"
        )
    idle = layer_counts(config.model.num_layers, config.mesh.pipe).count(0)
    if idle:
        found.append(
            f"{count(idle, 'stage')} of config.mesh.pipe={config.mesh.pipe} "
            f"{'has' if idle == 1 else 'have'} no layer, with config.model.num_layers="
            f"{config.model.num_layers}"
        )
    return found


def _show_hosts(mesh: Mesh, console: Console) -> None:
    hosts = host_names()
    console.show_hosts(host_parts(mesh, hosts))
    if operators_span_hosts(mesh, hosts):
        console.say(
            "Some operators are shared by devices of several hosts, which may be slow: let "
            "config.mesh.model divide the devices of a host, and config.mesh.order end in model."
        )


def _planned(run: Run, workdir: Path, console: Console, check: Callable[[], None]) -> Plan:
    """Returns the plan in the settings. If they leave something open, finds the fastest plan that
    keeps to them.
    """
    config = run.config
    if isinstance(run.plan, PlanRequest):
        _, planning = plan_slices(run.spec, run.plan, workdir, console, check)
        console.show_planning(planning)
        return planning.plan
    plan = as_first(run.plan)
    console.show_plan(plan, work_factors(config, plan))
    return plan


def _continue_data(
    run: Run, checkpoints: Checkpoints, saved_step: int | None, console: Console
) -> None:
    """Lets the run go on with the sequence after the last one that it has read, and says so if that
    is not what the batch size tells, or if the data have changed.
    """
    data, first_step = run.train_data, saved_step or 0
    saved = None if saved_step is None else checkpoints.data(saved_step)
    if saved is not None and saved_step is not None:
        begin, usual = saved["sequences"], data.sequences_before(first_step)
        before, now = checkpoints.seq_len(saved_step), run.config.model.seq_len
        if before != now:
            begin = 0
            console.say(
                f"beginning with the first training sequence of {now} tokens: those of {before} "
                "tokens that were read before are others"
            )
        elif begin != usual:
            console.say(
                f"going on with training sequence {begin:,}, since batches or sequences had "
                "another size before"
            )
        if saved["tokens"] != data.num_tokens:
            console.say(
                f"the training data are not those of the last start: {saved['tokens']:,} tokens "
                f"then, {data.num_tokens:,} now"
            )
        data.begin(first_step, begin)
    checkpoints.data_at = lambda step: {
        "sequences": data.sequences_before(step),
        "tokens": data.num_tokens,
    }


def _first_state(
    run: Run, checkpoints: Checkpoints, saved_step: int | None, console: Console
) -> TrainState:
    """Returns the state of the checkpoint, if there is one; otherwise a fresh state."""
    if saved_step is None:
        return init_state(run.spec, run.optimizer)
    like = abstract_state(run.spec, run.optimizer)
    state = checkpoints.restore(saved_step, like)
    after = f"continuing after step {saved_step}"
    console.say(after if saved_step else "starting from imported weights")
    return state


def _show_sample(run: Run, params: Params, stop: Stop, console: Console) -> None:
    """Shows how the model continues a held-out text."""
    config = run.config
    layout, rows = RowLayout.of(config), run.held_out.batch(0)[-1:]
    tokens, starts = layout.inputs(rows)[0], layout.document_starts(rows)
    if starts is not None:
        tokens = tokens[starts[0] == 0]  # the first document
    prompt = tokens[: max(1, config.model.seq_len // 2)]
    num_tokens = config.train.sample_tokens
    choose = chooser(TEMPERATURE, seed=config.train.seed)
    following = Generator(run.spec, params).tokens_after(prompt, choose)
    tokens = [next(following)]
    while len(tokens) < num_tokens and not stop.is_due():
        tokens.append(next(following))
    console.show_sample(*(_as_text(config, part) for part in (prompt, np.array(tokens))))


def _show_comparison(
    run: Run, plan: Plan, programs: Programs, state: TrainState, services: Services
) -> None:
    """Shows what token slices gain. The state cannot be used any more."""
    console = services.console
    if plan.num_stages == 1:
        console.say("there is one stage, which whole sequences do not keep waiting")
        return
    if all(len(slices) == 1 for slices in plan.token_slices):
        console.say("the plan has whole sequences, so there is nothing to compare them with")
        return
    console.say("timing the same model with whole sequences ...")
    rows = put_batch(run, run.held_out, 0)
    try:
        found = compare(run, plan, programs.train_step, state, rows, services.stop.is_due)
    except (Infeasible, jax.errors.JaxRuntimeError) as error:  # the latter if memory runs out
        console.say(f"whole sequences cannot be compared: {brief(error)}")
        return
    if found:
        console.show_comparison(plan.num_stages, found.sliced_seconds, found.whole_seconds)


def _as_text(config: Config, tokens: np.ndarray) -> str:
    """Returns tokens as text without control characters; as numbers if no tokenizer is known."""
    name = config.data.tokenizer
    if name != BYTES_NAME or config.model.vocab_size == BYTES:
        text = open_tokenizer("config.data.tokenizer", name).decode(tokens.tolist())
        return "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
        )
    return " ".join(map(str, tokens))
