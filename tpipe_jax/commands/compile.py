"""Compiles the training step of a run for devices that are not here: `tpipe compile`."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import optax
from jax.errors import JaxRuntimeError
from jax.stages import Compiled

from tpipe_jax.config.flags import CompileFlags
from tpipe_jax.config.settings import Config
from tpipe_jax.devices.hardware import GIB
from tpipe_jax.devices.targets import ALLOWANCE_BYTES, Target, gpu_target, tpu_target
from tpipe_jax.errors import UserError, brief
from tpipe_jax.files import as_user_error
from tpipe_jax.model.transformer import num_params
from tpipe_jax.pipeline.spec import StageSpec, spec_on_devices
from tpipe_jax.pipeline.tick_program import Exchanges, TickProgram, layers_in_a_tick, read_tick
from tpipe_jax.planning.bounds import check_devices
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import Schedule, make_schedule
from tpipe_jax.planning.settings import read_settings
from tpipe_jax.reporting.console import Console, count
from tpipe_jax.runtime.noise import without_noise
from tpipe_jax.training.memory import (
    TooLarge,
    budget,
    compile_step,
    fitting_step,
    host_bytes,
    is_out_of_memory,
    limit_bytes,
    program_bytes,
    too_little,
)
from tpipe_jax.training.optimizer import make_optimizer

MEGABYTE = 1e6


@dataclass(frozen=True)
class CompiledFor:
    """The training step of a config, compiled for a target."""

    flags: CompileFlags
    target: Target
    spec: StageSpec
    plan: Plan
    schedule: Schedule
    step: Compiled | None
    """None if the compiler refuses a step that does not fit, as that of TPUs does."""
    seconds: float
    """Time to trace and compile it."""
    tick: TickProgram | None
    limit_bytes: float | None
    shortage: str | None
    """Why it does not fit, if it does not."""

    def figures(self) -> dict[str, object]:
        """Returns what --json writes."""
        memory = self.step.memory_analysis() if self.step else None
        tick = self.tick
        figures = {
            "gpu": self.flags.gpu,
            "tpu": self.flags.tpu,
            "num_devices": len(self.target.devices),
            "peak_bytes": program_bytes(self.step) if self.step else None,
            "argument_bytes": memory.argument_size_in_bytes if memory else None,
            "temporary_bytes": memory.temp_size_in_bytes if memory else None,
            "limit_bytes": None if self.limit_bytes is None else int(self.limit_bytes),
            "fits": self.shortage is None,
            "copied_bytes_per_tick": tick.copied_bytes if tick else None,
            "kernels": asdict(tick.kernels) if tick else None,
            "collectives": {kind: n for kind, (n, _) in tick.exchanges.items()} if tick else None,
            "compile_seconds": round(self.seconds, 2),
            "jax": jax.__version__,
        }
        if self.spec.config.memory.offload:
            figures["host_bytes"] = host_bytes(self.spec, self.schedule)
        return figures


def compile_run(flags: CompileFlags, console: Console) -> None:
    """Compiles a step, prints what it needs and does, and writes --json if it is given.

    Raises `UserError` if there is no such target, if the settings don't fit it, or if the step
    needs more memory than a device has.
    """
    compiled = compile_for(flags)
    show(compiled, console)
    if flags.json is not None:
        _write(flags.json, compiled.figures())
    if compiled.shortage is not None:
        raise UserError(compiled.shortage)


def compile_for(flags: CompileFlags) -> CompiledFor:
    """Compiles the training step of a config for the devices that the flags name. Raises
    `UserError` as `compile_run` does, except for a step that does not fit.
    """
    mesh = flags.config.mesh
    if mesh.auto:
        raise UserError(
            "config.mesh.auto=true needs measurements on the devices, which are not here: set "
            "config.mesh.data, pipe and model."
        )
    check_devices("config.mesh", mesh.num_devices)
    plan = _given_plan(flags.config)
    with without_noise():  # of compilers that miss their devices
        target = _target(flags)
    spec = spec_on_devices(flags.config, target.devices, target.facts)
    optimizer, schedule, start = make_optimizer(spec.config), make_schedule(plan), time.monotonic()
    try:
        with without_noise():
            spec, step, shortage = _fitting_or_last(spec, plan, optimizer)
    except JaxRuntimeError as error:
        raise UserError(
            f"XLA cannot compile for a {target.facts.kind} here ({brief(error)}): install the "
            'compiler with all that belongs to it, by pip install "tpipe_jax[compile]" for GPUs.'
        ) from error
    seconds, tick = time.monotonic() - start, None
    if step is not None:
        tick = read_tick(step.as_text() or "", layers_in_a_tick(spec))
        assert tick, "a training step has a loop over ticks"
        assert 0 not in (tick.kernels.forward, tick.kernels.backward), "a stage works on slices"
    return CompiledFor(
        flags, target, spec, plan, schedule, step, seconds, tick, limit_bytes(spec), shortage
    )


def _target(flags: CompileFlags) -> Target:
    mesh = flags.config.mesh
    if flags.gpu is not None:
        return gpu_target(flags.gpu, mesh, flags.hosts)
    assert flags.tpu is not None
    return tpu_target(flags.tpu, mesh)


def _fitting_or_last(
    spec: StageSpec, plan: Plan, optimizer: optax.GradientTransformation
) -> tuple[StageSpec, Compiled | None, str | None]:
    """Returns the spec and the step with the first policy that fits. If there is none: those of the
    last policy, and why it does not fit. There is no step where the compiler refuses it.
    """
    try:
        return *fitting_step(spec, plan, optimizer), None
    except TooLarge as error:
        spec, step, schedule = error.spec, error.step, make_schedule(plan)
        if step is None:
            try:
                step = compile_step(spec, schedule, optimizer)
            except JaxRuntimeError as refusal:
                if is_out_of_memory(refusal):
                    return spec, None, str(error)
                raise
        needed = program_bytes(step)
        return spec, step, too_little(spec, schedule, optimizer, limit_bytes(spec), needed)


def _given_plan(config: Config) -> Plan:
    """Returns the plan in the settings. If these have only token slices, sequences go one after
    another. Raises `UserError` if token slices are missing.
    """
    if config.plan.file is None and config.plan.batch_slices == "auto":
        num_rows = max(1, config.train.batch_size // config.mesh.data)
        plan = replace(config.plan, batch_slices=f"uniform:{num_rows}")
        config = replace(config, plan=plan)
    plan = read_settings(config)
    if isinstance(plan, Plan):
        return plan
    raise UserError(
        f"config.plan.token_slices={config.plan.token_slices} needs measurements on the devices, "
        "which are not here: give slices, such as uniform:16, or a plan with config.plan.file."
    )


def show(compiled: CompiledFor, console: Console) -> None:
    """Prints what is compiled, the memory of a device, and what a tick does."""
    spec = compiled.spec
    console.show_facts(_facts(compiled))
    parts = budget(spec, compiled.schedule, make_optimizer(spec.config))
    rows = [(name, f"{num_bytes / GIB:.2f}") for name, num_bytes in parts.items()]
    rows += [("all of these", f"{sum(parts.values()) / GIB:.2f}")]
    rows += [(name, f"{num_bytes / GIB:.2f}") for name, num_bytes in _memory(compiled).items()]
    remat = spec.config.memory.remat
    console.show_table(f"memory of a device with config.memory.remat={remat}", ["", "GiB"], rows)
    if compiled.tick:
        _show_tick(compiled.tick, console)
    console.say(_unknown(compiled))
    if compiled.shortage is None and compiled.limit_bytes is None:
        console.say(f"XLA compiles it; the memory of a {spec.device.kind} is not known here.")
    elif compiled.shortage is None:
        console.say(f"It fits, with {_spare(compiled):.2f} GiB to spare.")


def _show_tick(tick: TickProgram, console: Console) -> None:
    kernels = tick.kernels
    console.show_table(
        "kernels of one layer for one slice",
        ["", "kernels", "in each turn over its context"],
        [
            ("forward", str(kernels.forward), str(kernels.forward_context)),
            ("backward", str(kernels.backward), str(kernels.backward_context)),
        ],
    )
    console.show_table("copies in a tick", ["", "MB"], [("at most", _megabytes(tick.copied_bytes))])
    _show_exchanges(tick, console)


def _facts(compiled: CompiledFor) -> dict[str, str]:
    spec, plan, target = compiled.spec, compiled.plan, compiled.target
    model, mesh, config = spec.config.model, spec.config.mesh, spec.config
    lengths = sorted({length for slices in plan.token_slices for length in slices})
    num_slices = sum(map(len, plan.token_slices))
    tokens = " to ".join(str(n) for n in sorted({lengths[0], lengths[-1]}))
    return {
        "model": f"{num_params(model):,} parameters: {count(model.num_layers, 'layer')}, width "
        f"{model.d_model}, {count(model.num_heads, 'head')}, vocabulary {model.vocab_size}",
        "devices": f"{mesh.num_devices} x {spec.device.kind} on "
        f"{count(target.num_hosts, 'host')}: data {mesh.data} x pipe {mesh.pipe} x model "
        f"{mesh.model}",
        "step": f"{count(config.train.batch_size, 'sequence')} of "
        f"{count(model.seq_len, 'token')}; a data shard's in {count(num_slices, 'slice')} of "
        f"{tokens} tokens, of {count(len(lengths), 'length')}",
        "program": f"schedule {plan.schedule}, {len(compiled.schedule.forward)} ticks, "
        f"{config.precision.compute}, attention {config.attention.backend}; compiled in "
        f"{compiled.seconds:.0f} s by jax {jax.__version__}",
    }


def _memory(compiled: CompiledFor) -> dict[str, int | float]:
    """Returns XLA's figures and the limit, in bytes by name."""
    found: dict[str, int | float] = {}
    if compiled.step and (analysis := compiled.step.memory_analysis()):
        found = {
            "XLA's plan: state and batch": analysis.argument_size_in_bytes,
            "XLA's plan: all else": analysis.temp_size_in_bytes,
            "XLA's plan: peak": program_bytes(compiled.step),
        }
    if compiled.limit_bytes is not None:
        found["limit"] = compiled.limit_bytes
    if offloaded := host_bytes(compiled.spec, compiled.schedule):
        found["saved values on the host"] = offloaded
    return found


def _spare(compiled: CompiledFor) -> float:
    assert compiled.limit_bytes is not None
    assert compiled.step
    return (compiled.limit_bytes - program_bytes(compiled.step)) / GIB


def _show_exchanges(tick: TickProgram, console: Console) -> None:
    places: dict[str, Exchanges] = {
        "a tick, for its slices": tick.exchanges,
        "embedding, losses and their gradients": tick.part_exchanges,
        "a step, besides its ticks": tick.step_exchanges,
    }
    rows = [
        (place if n == 0 else "", kind, str(number), _megabytes(num_bytes))
        for place, exchanges in places.items()
        for n, (kind, (number, num_bytes)) in enumerate(exchanges.items())
    ]
    if rows:
        console.show_table("exchanges between devices", ["", "kind", "number", "MB"], rows, 2)
    else:
        console.say("no exchanges between devices")


def _unknown(compiled: CompiledFor) -> str:
    """Says what only a run can tell."""
    if compiled.flags.tpu is not None:
        return (
            "Only a run can tell its speed, and whether devices that take different branches wait "
            "for each other there."
        )
    if compiled.spec.config.memory.limit_gib is not None:
        limit = "The limit is config.memory.limit_gib."
    else:
        limit = (
            f"The limit is the part of {compiled.target.device_bytes / GIB:.2f} GiB that jax "
            f"takes, less {ALLOWANCE_BYTES / GIB:g} GiB for that scratch memory; CUDA and NCCL "
            "have the rest of the GPU."
        )
    return (
        "Only a run can tell which kernels XLA chooses by timing them, how much scratch memory "
        f"these and cuDNN need, and how much CUDA and NCCL need. {limit}"
    )


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / MEGABYTE:.1f}"


def _write(path: Path, figures: dict[str, object]) -> None:
    with as_user_error(
        lambda error: f"cannot write --json={path} ({error.strerror}): name another file."
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
