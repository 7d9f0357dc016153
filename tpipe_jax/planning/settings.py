"""Reads the plan in the settings: a complete plan, or the limits of the planner."""

import math
from dataclasses import replace

from tpipe_jax.config.paths import expanded
from tpipe_jax.config.settings import Config, ScheduleName
from tpipe_jax.errors import UserError
from tpipe_jax.planning.bounds import (
    MAX_SEQUENCES,
    MAX_SHAPES,
    check_sequences,
    check_slices,
    check_stages,
    check_times,
    fits_times,
    most_slices,
)
from tpipe_jax.planning.placement import chunk_factors
from tpipe_jax.planning.plan import Plan, PlanRequest, load_plan


def read_settings(config: Config) -> Plan | PlanRequest:
    """Returns the plan that the settings contain or whose file they name, or else the request to
    the planner.

    Raises `UserError` if settings contradict each other, or the file is not a plan for them.
    """
    train, mesh = config.train, config.mesh
    if train.batch_size % mesh.data:
        raise UserError(
            f"config.train.batch_size={train.batch_size} is not a multiple of "
            f"config.mesh.data={mesh.data}: set a batch size of "
            f"{mesh.data * max(1, round(train.batch_size / mesh.data))}, or another mesh."
        )
    check_stages("config.mesh.pipe", mesh.pipe)
    batch_slices = parse_slices(
        config.plan.batch_slices,
        train.batch_size // mesh.data,
        "config.plan.batch_slices",
        "the batch of one data shard, config.train.batch_size / config.mesh.data",
    )
    token_slices = parse_slices(
        config.plan.token_slices,
        config.model.seq_len,
        "config.plan.token_slices",
        "config.model.seq_len",
    )
    unit_tokens(config)
    schedule = _read_schedule(config, batch_slices)
    request = PlanRequest(
        mesh.pipe,
        train.batch_size // mesh.data,
        config.model.seq_len,
        batch_slices,
        token_slices,
        schedule,
        config.plan.chunks,
        config.model.num_layers,
    )
    if config.plan.file is not None:
        if batch_slices or token_slices:
            raise UserError(
                f"config.plan.file={config.plan.file} and slices of their own exclude each other: "
                "leave config.plan.batch_slices and config.plan.token_slices at auto."
            )
        if config.plan.schedule == "auto":
            request = replace(request, schedule=None)  # the file decides
        plan = load_plan(expanded("config.plan.file", config.plan.file), request)
        check_plan_serves(f"config.plan.file={config.plan.file}", plan, config)
        return plan
    if batch_slices and token_slices:
        slices = batch_slices, (token_slices,) * len(batch_slices)
        schedule = schedule or "terapipe"
        num_chunks = replace(config.plan, schedule=schedule).num_chunks
        plan = Plan(mesh.pipe, *slices, schedule=schedule, num_chunks=num_chunks)
        _check_work(config, batch_slices, token_slices, num_chunks)
        return plan
    _check_work(config, batch_slices, token_slices, config.plan.chunks or 1)
    _check_search(config, batch_slices, token_slices)
    return request


def _check_work(
    config: Config,
    batch_slices: tuple[int, ...] | None,
    token_slices: tuple[int, ...] | None,
    num_chunks: int,
) -> None:
    """Raises `UserError` if the slices that are given are more than can be run."""
    if len(batch_slices or ()) > MAX_SEQUENCES:
        raise UserError(
            f"config.plan.batch_slices has {len(batch_slices or ())} batch slices, and each is "
            f"embedded on its own: give at most {MAX_SEQUENCES}."
        )
    num_slices = len(batch_slices or (1,)) * len(token_slices or (1,)) * num_chunks
    check_slices(
        "the product of config.plan.batch_slices, config.plan.token_slices and config.plan.chunks",
        *(config.mesh.pipe, num_slices),
    )
    lengths = set(token_slices or ())
    if len(lengths) > MAX_SHAPES:
        raise UserError(
            f"config.plan.token_slices has {len(lengths)} lengths, each with programs of its own, "
            f"and at most {MAX_SHAPES} can be compiled: let uniform:{len(token_slices or ())} "
            "divide the sequence."
        )


def _check_search(
    config: Config, batch_slices: tuple[int, ...] | None, token_slices: tuple[int, ...] | None
) -> None:
    """Raises `UserError` if there is too much to choose from for the planner."""
    num_rows, seq_len = config.train.batch_size // config.mesh.data, config.model.seq_len
    if batch_slices is None:
        check_sequences("config.train.batch_size / config.mesh.data", num_rows)
    if token_slices is None:
        unit = unit_tokens(config)
        check_times(
            f"config.model.seq_len={seq_len} with a unit of {unit} tokens",
            *(num_rows, seq_len // unit),
            "set config.plan.unit_tokens to a larger divisor of the length, choose a length that "
            "has one, or give config.plan.token_slices",
        )
    else:
        check_times(
            "config.plan.token_slices",
            *(num_rows, len(token_slices), "give fewer token slices"),
        )


def settled(config: Config, plan: Plan) -> Config:
    """Returns the config with the schedule and chunks of a plan: these decide where layers lie."""
    chunks = plan.num_chunks if plan.schedule == "interleaved" else None
    return replace(config, plan=replace(config.plan, schedule=plan.schedule, chunks=chunks))


def _read_schedule(config: Config, batch_slices: tuple[int, ...] | None) -> ScheduleName | None:
    """Returns the schedule, or None where the planner chooses it.

    Raises `UserError` if the schedule is of no use under the other settings or contradicts them.
    """
    mesh, chunks = config.mesh, config.plan.chunks
    schedule = "interleaved" if chunks and config.plan.schedule == "auto" else config.plan.schedule
    if schedule in ("1f1b", "1f1b-deferred"):
        num_rows = config.train.batch_size // mesh.data
        if num_rows == 1 or len(batch_slices or (1, 1)) == 1:
            raise UserError(
                f"config.plan.schedule={schedule} sends one batch slice backward while others go "
                f"forward, and a data shard has only one: set config.plan.schedule=terapipe, or "
                f"config.{'plan.batch_slices' if num_rows > 1 else 'train.batch_size'} so that "
                "there are several."
            )
    _check_serves(f"config.plan.schedule={schedule}", schedule, config)
    if chunks and schedule != "interleaved":
        raise UserError(
            f"config.plan.chunks={chunks} is for config.plan.schedule=interleaved, not {schedule}: "
            "leave one of them out."
        )
    num_chunks = chunks or config.plan.num_chunks
    if num_chunks > 1 and num_chunks * mesh.pipe > config.model.num_layers:
        raise UserError(
            f"config.plan.schedule={schedule} with {num_chunks} chunks of each of "
            f"config.mesh.pipe={mesh.pipe} stages needs as many layers, {num_chunks * mesh.pipe}, "
            f"and config.model.num_layers={config.model.num_layers}: set fewer config.plan.chunks "
            "or stages, or config.plan.schedule=terapipe."
        )
    if schedule == "auto":
        return "terapipe" if needs_whole_batch(config) else None
    return schedule


def check_plan_serves(name: str, plan: Plan, config: Config) -> None:
    """Raises `UserError` if the settings refuse the schedule of a plan, as they would if they named
    the schedule themselves; `name` begins the sentence.
    """
    _check_serves(f"{name} has a schedule of {plan.schedule}, which", plan.schedule, config)


def _check_serves(begin: str, schedule: str, config: Config) -> None:
    if schedule in ("1f1b", "1f1b-deferred") and (setting := needs_whole_batch(config)):
        raise UserError(
            f"{begin} keeps a part of the batch at a time, and {setting[0]} needs all of it: set "
            f"{setting[1]} or config.plan.schedule=terapipe."
        )
    if schedule in ("interleaved", "1f1b-deferred") and config.mesh.pipe == 1:
        raise UserError(
            f"{begin} shortens the time in which stages wait for each other, and "
            "config.mesh.pipe=1 has one: set another schedule, or more stages."
        )


def needs_whole_batch(config: Config) -> tuple[str, str] | None:
    """Returns the setting for which all of a batch has to go forward before anything goes backward,
    and the setting without that need; None if there is no such need.
    """
    if config.memory.defer_weight_grads:
        return "config.memory.defer_weight_grads=true", "config.memory.defer_weight_grads=false"
    if config.balance_weight:
        return (
            f"config.train.balance_weight={config.balance_weight:g}",
            "config.train.balance_weight=0",
        )
    return None


def unit_tokens(config: Config) -> int:
    """Returns the unit of planned slices in tokens: each slice is a multiple of it.

    Unless set, it is the largest divisor of `seq_len` up to 8, or up to `seq_len` / 256 if larger;
    of large batches, the next one whose slices the planner can look at, if there are 16 units of
    it. Raises `UserError` if the setting does not divide the sequence.
    """
    seq_len, unit = config.model.seq_len, config.plan.unit_tokens
    if unit is None:
        num_rows, options = config.train.batch_size // config.mesh.data, divisors(seq_len)
        unit = max(n for n in options if n <= max(8, seq_len // 256))
        coarser = (n for n in options if unit < n <= seq_len // 16)
        fitting = (n for n in (unit, *coarser) if fits_times(num_rows, seq_len // n))
        return next(fitting, unit)
    if seq_len % unit:
        raise UserError(
            f"config.plan.unit_tokens={unit} does not divide config.model.seq_len={seq_len}: pick "
            "a divisor."
        )
    return unit


def divisors(number: int) -> list[int]:
    """Returns all divisors of a number, ascending."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def parse_slices(text: str, total: int, setting: str, total_name: str) -> tuple[int, ...] | None:
    """Returns the slices that `uniform:N` or a list such as `96,64,56,40` names; None for `auto`.

    Uniform slices differ by one where N does not divide the total. The longer ones come first,
    since the first slices have the shortest context. Raises `UserError` for anything but positive
    lengths that sum to `total`.
    """
    if text.strip() == "auto":
        return None
    kind, _, count = text.partition(":")
    most, given = most_slices(1), text if len(text) <= 60 else f"{text[:50]} ..."
    if kind.strip() == "uniform" and count.strip().isdecimal():
        num = _whole(count)
        if not 1 <= num <= total:
            raise UserError(
                f"{setting}={given} must ask for 1 to {total} slices, since {total_name} is "
                f"{total}."
            )
        if num > most:
            raise UserError(f"{setting}={given} must ask for at most {most} slices.")
        return uniform(total, num)
    if text.count(",") >= most:
        raise UserError(f"{setting}={given} must have at most {most} slices.")
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and _whole(part) > 0 for part in parts):
        raise UserError(
            f"{setting}={given} is neither auto nor uniform:N nor a list of positive lengths as "
            "96,64,56,40."
        )
    slices = tuple(map(_whole, parts))
    if sum(slices) != total:
        raise UserError(
            f"{setting}={given} sums to {sum(slices)}, but {total_name} is {total}: "
            f"change the slices, or let uniform:{min(len(slices), total)} divide it."
        )
    return slices


def _whole(text: str) -> int:
    """Returns the number that decimal digits name, or one that is too large for more than 18."""
    text = text.strip()
    return int(text) if len(text) <= 18 else 10**18


def uniform(total: int, num: int) -> tuple[int, ...]:
    """Returns `num` parts of `total` that differ by at most one, the larger ones first."""
    return tuple(total // num + (i < total % num) for i in range(num))


def work_factors(config: Config, plan: Plan | None = None) -> list[float]:
    """Returns the layers of each stage relative to the stage with most layers. With a plan: of each
    chunk of each stage (`placement.chunk_factors`).
    """
    num_chunks = plan.num_chunks if plan else 1
    return chunk_factors(config.model.num_layers, config.mesh.pipe, num_chunks)
