"""The memory of a step on a device: an estimate, XLA's own figure, and the policy that fits."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.stages import Compiled

from tpipe_jax.devices.exchanges import compile_checked
from tpipe_jax.devices.hardware import (
    DEFAULT_FRACTION,
    FRACTION_VARIABLES,
    GIB,
    memory_fraction,
)
from tpipe_jax.errors import Infeasible, UserError
from tpipe_jax.model.remat import candidates
from tpipe_jax.model.sharding import padded_vocab_size
from tpipe_jax.pipeline.footprint import (
    activation_bytes_per_token,
    cache_bytes_per_token,
    deferred_bytes_per_token,
    host_bytes_per_token,
    trunk_bytes_per_token,
)
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.pipeline.vocab_parallel import tile_tokens
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.schedule import Schedule, make_schedule
from tpipe_jax.planning.schedule_check import check
from tpipe_jax.planning.settings import needs_whole_batch, settled, uniform, unit_tokens
from tpipe_jax.runtime.processes import host_names
from tpipe_jax.training.state import abstract_rows, abstract_state, state_bytes
from tpipe_jax.training.step import make_train_step

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of Linux, in bytes, or a word


def budget(
    spec: StageSpec, schedule: Schedule, optimizer: optax.GradientTransformation
) -> dict[str, int]:
    """Estimates the bytes that a step uses on a device, by their purpose.

    Leaves out what a stage needs only while it works on a slice. Not all of these bytes are in use
    at the same time.
    """
    model, mesh = spec.config.model, spec.mesh
    rows = schedule.num_rows * model.seq_len, schedule.num_gradient_rows * model.seq_len
    caches, activations = (
        sum(n * per_token for n, per_token in zip(rows, of(spec), strict=True))
        for of in (cache_bytes_per_token, activation_bytes_per_token)
    )
    b, n = schedule.longest_shape
    activations += schedule.num_slots * b * n * deferred_bytes_per_token(spec)
    params, opt_state = state_bytes(abstract_state(spec, optimizer))
    num_rows = padded_vocab_size(model, mesh) // (mesh.shape["pipe"] * mesh.shape["model"])
    part_rows = max(part.num_rows for part in schedule.parts)
    logits = part_rows * tile_tokens(part_rows, model.seq_len) * num_rows * 4
    return {
        "parameters": params,
        "gradients": params,
        "optimiser state": opt_state,
        "attention caches and their gradients": caches,
        "other activations": activations - caches,
        "input and output of the stage": rows[0] * trunk_bytes_per_token(spec),
        "logits of a tile, softmax and gradients": 3 * logits,
    }


def host_bytes(spec: StageSpec, schedule: Schedule) -> int:
    """Returns the bytes of the host's memory that a step uses for a device (`memory.offload`)."""
    return schedule.num_rows * spec.config.model.seq_len * host_bytes_per_token(spec)


def host_limit_bytes(spec: StageSpec) -> float:
    """Returns the share of a device in the memory of its host, the least of all hosts; infinity
    where nothing is offloaded, or the devices are not here.
    """
    is_here = set(jax.devices()).issuperset(spec.mesh.devices.flat)
    if not spec.config.memory.offload or not is_here:
        return math.inf
    return _least(_machine_bytes() / _num_on_this_host(spec.mesh))


def _machine_bytes() -> float:
    """Returns the memory of this machine, or of the container that it is seen from."""
    has = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # there is no limit, and then the file has a word
        has = min(has, float(int(CONTAINER_LIMIT.read_text(encoding="utf-8"))))
    return has


def _least(value: float) -> float:
    """Returns the least value of all processes."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.process_allgather(np.float64(value)).min())


def program_bytes(program: Compiled) -> int:
    """Returns the bytes that a program needs, as XLA says; 0 if the backend does not tell."""
    analysis = program.memory_analysis()
    if analysis is None:
        return 0
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes


def limit_bytes(spec: StageSpec) -> float | None:
    """Returns the bytes of a device that a step may use; None where that is not known.

    This is the setting or, without it, the least that the device of any process reports. For a CPU
    it is an equal share of the machine's memory, which other programs may need too.
    """
    limit_gib, mesh = spec.config.memory.limit_gib, spec.mesh
    if limit_gib is not None:
        return limit_gib * GIB
    reported = math.inf if spec.device.memory_bytes is None else spec.device.memory_bytes
    if spec.device.platform == "cpu":
        machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        reported = machine_bytes / _num_on_this_host(mesh)
    reported = _least(reported)
    return reported if reported < math.inf else None


def _num_on_this_host(mesh: Mesh) -> int:
    """Returns the number of devices of the mesh on the host of this process."""
    hosts = host_names()
    own = hosts[jax.process_index()]
    return sum(hosts[device.process_index] == own for device in mesh.devices.flat)


def is_out_of_memory(error: JaxRuntimeError) -> bool:
    """Whether jax failed since a device has too little memory, when it ran or compiled."""
    return "RESOURCE_EXHAUSTED" in str(error)


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turns an out-of-memory error of a device into a `UserError`.

    In a run of one process it is `Infeasible`. With several processes, others may not have failed.
    """
    try:
        yield
    except JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        brief = str(error).splitlines()[0]
        kind = Infeasible if jax.process_count() == 1 else UserError
        raise kind(
            f"a device has too little memory ({brief}): set config.memory.limit_gib below "
            "what it has, with config.memory.remat=auto, to have what fits chosen; or give "
            "config.mesh more devices, or make config.train.batch_size or config.model smaller."
        ) from error


class TooLarge(Infeasible):
    """No training step fits into the memory of a device."""

    def __init__(self, sentence: str, spec: StageSpec, step: Compiled | None) -> None:
        super().__init__(sentence)
        self.spec = spec
        """The spec of the step that needs least."""
        self.step = step
        """The step, if it was compiled to find out."""


def fitting_step(
    spec: StageSpec, plan: Plan, optimizer: optax.GradientTransformation
) -> tuple[StageSpec, Compiled]:
    """Compiles the training step with the first allowed policy (`remat.candidates`) that fits in
    memory.

    Returns the spec with this policy and with the schedule of the plan, and the compiled step.
    Raises `TooLarge` if no policy fits, and `UserError` if none fits the memory of the hosts.
    """
    spec = spec.with_config(settled(spec.config, plan))
    limit, needed, trial, step = limit_bytes(spec), 0, spec, None
    schedule = make_schedule(plan)
    check(schedule)
    host_limit = host_limit_bytes(spec)
    for remat in candidates(spec.config.memory):
        trial, step = _with_policy(spec, remat), None
        if host_bytes(trial, schedule) > host_limit:
            continue
        parts = budget(trial, schedule, optimizer).values()
        if limit is not None and max(parts) > limit:
            needed = sum(parts)
            continue  # too much already, so that a long compilation is spared
        try:
            step = compile_step(trial, schedule, optimizer)
        except JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            needed = sum(budget(trial, schedule, optimizer).values())
            continue  # TPUs' compiler refuses what does not fit
        needed = program_bytes(step)
        if limit is None or needed <= limit:
            return trial, step
    if (offloaded := host_bytes(trial, schedule)) > host_limit:
        raise UserError(
            f"config.memory.offload=true keeps {offloaded / GIB:.3g} GiB on the host for each "
            f"device, with config.memory.remat={trial.config.memory.remat}, and the host has "
            f"{host_limit / GIB:.3g} GiB for each: set config.memory.remat=full, or shorten "
            "config.train.batch_size or config.model.seq_len."
        )
    raise TooLarge(too_little(trial, schedule, optimizer, limit, needed), trial, step)


def compile_step(
    spec: StageSpec, schedule: Schedule, optimizer: optax.GradientTransformation
) -> Compiled:
    """Compiles the training step of a spec. Raises `Infeasible` as `check_branches` does."""
    return compile_checked(
        make_train_step(spec, schedule, optimizer),
        spec.mesh,
        abstract_state(spec, optimizer),
        abstract_rows(spec),
    )


def fitting_policy(
    spec: StageSpec, request: PlanRequest, optimizer: optax.GradientTransformation
) -> StageSpec:
    """Returns the spec with the first allowed policy under which the smallest slices fit.

    Raises `Infeasible` if there is none.
    """
    first = _with_policy(spec, candidates(spec.config.memory)[0])
    limit = limit_bytes(spec)
    batch_slices = request.batch_slices or (1,) * request.batch_size
    num_slices = request.seq_len // unit_tokens(spec.config)
    token_slices = request.token_slices or uniform(request.seq_len, num_slices)
    slices = batch_slices, (token_slices,) * len(batch_slices)
    plans = [
        Plan(
            request.num_stages,
            *slices,
            schedule=name,
            num_chunks=request.chunk_options[0] if name == "interleaved" else 1,
        )
        for name in request.schedules
    ]

    def needed(plan: Plan) -> int:
        settled_spec = first.with_config(settled(first.config, plan))
        return sum(budget(settled_spec, make_schedule(plan), optimizer).values())

    smallest = min(plans, key=needed)
    if limit is None or 2 * needed(smallest) < limit:
        return first  # it almost surely fits; `fitting_step` checks that later
    fitting, _ = fitting_step(spec, smallest, optimizer)
    return _with_policy(spec, fitting.config.memory.remat)


def _with_policy(spec: StageSpec, remat: str) -> StageSpec:
    memory = replace(spec.config.memory, remat=remat)
    return spec.with_config(replace(spec.config, memory=memory))


def too_little(
    spec: StageSpec,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    limit: float | None,
    needed: int,
) -> str:
    """Says by how much the last policy exceeds the limit, what takes most, and what would help."""
    config = spec.config
    if limit is None:
        shortage = "the memory of a device is"
    elif config.memory.limit_gib is not None:
        shortage = (
            f"config.memory.limit_gib={config.memory.limit_gib:g} is "
            f"{(needed - limit) / GIB:.3g} GiB"
        )
    else:
        shortage = (
            f"the memory of a device, {limit / GIB:.3g} GiB, is {(needed - limit) / GIB:.3g} GiB"
        )
    parts = budget(spec, schedule, optimizer)
    of_state = sum(parts[name] for name in ("parameters", "gradients", "optimiser state"))
    saved = parts["attention caches and their gradients"] + parts["other activations"]
    has_batch_slices = len({item.row for item in schedule.items}) > 1
    one_by_one = "config.plan.schedule=1f1b" + " with more batch slices" * (not has_batch_slices)
    could_take_turns = schedule.num_rows > 1 and len(schedule.parts) == 1
    remedies = {
        one_by_one: (could_take_turns and not needs_whole_batch(config)) or schedule.num_slots > 0,
        "config.memory.defer_weight_grads=false": config.memory.defer_weight_grads,
        "config.memory.remat=full": config.memory.remat != "full",
        "config.memory.offload=true": spec.device.platform == "gpu" and not config.memory.offload,
        "a smaller config.train.batch_size or config.model.seq_len": True,
        "more devices in config.mesh.pipe or config.mesh.model": True,
        "config.optim.shard_state with more data shards": not config.optim.shard_state,
    }
    return (
        f"{shortage} less than a step takes with "
        f"config.memory.remat={config.memory.remat}: about {of_state / GIB:.3g} GiB are "
        f"parameters, gradients and optimiser state, and {saved / GIB:.3g} GiB are saved for the "
        f"backward pass; {', '.join(text for text, helps in remedies.items() if helps)} would "
        f"bring it down{_larger_share(spec)}{_other_devices(spec)}."
    )


def _other_devices(spec: StageSpec) -> str:
    """Says how to plan for GPUs, where a CPU has too little memory."""
    if spec.device.platform != "cpu" or spec.config.memory.limit_gib is not None:
        return ""
    return "; for GPUs that are not here, tpipe plan --gpu=h100 needs none of this memory"


def _larger_share(spec: StageSpec) -> str:
    """Says how jax takes more of a GPU than it does by default."""
    is_default = spec.config.memory.limit_gib is None and memory_fraction() == DEFAULT_FRACTION
    if spec.device.platform != "gpu" or not is_default:
        return ""
    return f", and {FRACTION_VARIABLES[0]}=0.9 in the environment gives a step more"
