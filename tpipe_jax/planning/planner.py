"""Finds the plan of a step from the times of slices, and plainer plans to compare. No jax."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tpipe_jax.config.settings import ScheduleName
from tpipe_jax.errors import Infeasible, UserError
from tpipe_jax.planning.bounds import check_sequences, check_slices, check_stages
from tpipe_jax.planning.estimator import Estimator
from tpipe_jax.planning.latency import DEFERRED, LatencyTable, Profile
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.schedule_search import (
    NEAR,
    Option,
    best_uniform_plan,
    complexity,
    search_schedule,
    step_seconds,
    within_memory,
)
from tpipe_jax.planning.slicer import least_longest

GIB = 2**30
TIE = 0.01  # schedules count as equally fast within this fraction of the predicted time
TIMED_ERROR = (
    0.02  # by which fraction the predicted time of a plan may be off whose slices were timed
)


@dataclass(frozen=True)
class Alternative:
    """Numbers of slices and time of a plan with uniform slices, to compare with the best plan."""

    batch_slices: int
    token_slices: int
    """Token slices of each batch slice."""
    step_seconds: float
    plan: Plan | None = None

    @classmethod
    def of(cls, plan: Plan) -> "Alternative":
        """Returns the figures of a plan that has a prediction."""
        return cls(len(plan.batch_slices), len(plan.token_slices[0]), step_seconds(plan), plan)


@dataclass(frozen=True)
class Planning:
    """A plan with its prediction, and how it was found."""

    plan: Plan
    chunk_factors: tuple[float, ...]
    """The time of each chunk of each stage under the plan (`Estimator.chunk_factors`)."""
    options: tuple[Option, ...]
    """The best plan under each schedule that there was to choose from."""
    unsliced: Alternative | None
    """The fastest plan that does not slice sequences, in batch slices of equal size; None where no
    such plan is allowed, or token slices are given."""
    best_uniform: Alternative | None
    num_solves: int
    search_seconds: float
    fastest: Plan
    """The fastest plan; another one than `plan` if that is simpler to run, and as fast as far as
    the latencies can tell."""
    fastest_uniform: Plan
    """The fastest uniform plan under any schedule, or else the fastest plan."""
    tolerance: float
    """By which fraction the time of the fastest plan may be off."""


def find_plan(
    table: LatencyTable,
    request: PlanRequest,
    stage_factors: Sequence[float],
    memory_limit_bytes: float | None = None,
) -> Planning:
    """Returns the plan to take of those that keep to the request and to the memory limit.

    The fastest plan is known only as well as the latencies are, and a search among many plans finds
    those whose time is underestimated. So a uniform plan is taken instead if it is as fast within
    that error: of uniform plans that are as fast as the fastest of them, the one that is simplest
    to run, with the fewest lengths of slices, and then with the fewest slices. A plan under the
    `preferred` schedule comes first. Raises `UserError` if there is no plan.
    """
    start = time.perf_counter()
    check_request(request)
    _check_schedule(table, request)
    estimator = Estimator.of(table, request, stage_factors)
    found = [search_schedule(name, estimator, memory_limit_bytes) for name in request.schedules]
    options = [option for option, _ in found if option]
    fitting = [option for option in options if option.fits]
    if not fitting:
        raise _nothing_allowed(estimator, memory_limit_bytes)
    fastest = min((option.plan for option in fitting), key=step_seconds)
    allowed = within_memory(estimator, memory_limit_bytes)
    unsliced, uniform = (
        best_uniform_plan(allowed, counts) for counts in ([1], range(1, len(estimator.cuts)))
    )
    uniform_plans = [plan for option in fitting for plan in option.plainer]
    fastest_uniform = min(uniform_plans, key=step_seconds, default=fastest)
    error = 0.0 if table.profile is None else error_of(fastest, table.profile)
    if error and step_seconds(fastest_uniform) <= (1 + error) * step_seconds(fastest):
        most_seconds = (1 + TIMED_ERROR) * step_seconds(fastest_uniform)
    else:
        most_seconds = (1 + (TIMED_ERROR if error else TIE)) * step_seconds(fastest)
    plans = [option.plan for option in fitting] + uniform_plans * bool(error)
    usual = preferred(request.num_stages)
    chosen = min(
        (plan for plan in plans if step_seconds(plan) <= most_seconds),
        key=lambda plan: (
            plan.schedule != usual,
            complexity(plan) if error else (0, 0),
            step_seconds(plan),
        ),
    )
    return Planning(
        chosen,
        tuple(estimator.chunk_factors(chosen.num_chunks)),
        tuple(options),
        Alternative.of(unsliced) if unsliced else None,
        Alternative.of(uniform) if uniform else None,
        num_solves=sum(num_solves for _, num_solves in found),
        search_seconds=time.perf_counter() - start,
        fastest=fastest,
        fastest_uniform=fastest_uniform,
        tolerance=error,
    )


def check_request(request: PlanRequest) -> None:
    """Raises `UserError` if a plan for the request takes more than can be done."""
    check_stages("the number of stages", request.num_stages)
    if request.batch_slices is None:
        check_sequences("the batch size", request.batch_size)
    num_slices = len(request.batch_slices or (1,)) * len(request.token_slices or (1,))
    check_slices("the request", request.num_stages, num_slices * (request.num_chunks or 1))


def error_of(plan: Plan, profile: Profile) -> float:
    """Returns by which fraction the predicted time of a plan may be off: `TIMED_ERROR` if all its
    slices were timed, else `NEAR`.
    """
    timed = {sample[:2] for sample in profile.samples if not sample.is_test}
    return TIMED_ERROR if plan.shapes <= timed else NEAR


def _check_schedule(table: LatencyTable, request: PlanRequest) -> None:
    """Raises `UserError` if the requested schedule does not suit the request, or needs times that
    the table does not have.
    """
    schedule = request.schedule
    if schedule == "interleaved" and not request.chunk_options:
        raise UserError(
            f"the schedule {schedule} needs several stages, each with a layer for each of its "
            f"chunks, and there are {request.num_stages} stages of {request.num_layers or 'some'} "
            "layers: plan for terapipe, or for other stages."
        )
    if schedule == "1f1b-deferred" and table.deferred is None:
        raise UserError(
            f"the schedule {schedule} can't be planned, since the latencies come without "
            f"{' and '.join(DEFERRED)}: plan from a config of several stages and sequences, or "
            "for 1f1b."
        )
    if schedule in (None, "interleaved") or schedule in replace(request, schedule=None).schedules:
        return
    few = "stages" if request.num_stages == 1 and schedule == "1f1b-deferred" else "batch slices"
    raise UserError(
        f"the schedule {schedule} needs several {few}, and there is only one: plan for terapipe, "
        "which is the same then, or for more of them."
    )


def preferred(num_stages: int) -> ScheduleName:
    """The schedule to take among equally fast ones: `1f1b` on one stage, since it stores fewer
    activations; otherwise `terapipe`, because under `1f1b` stages wait for each other in every
    tick, which costs more than the simulation knows.
    """
    return "1f1b" if num_stages == 1 else "terapipe"


def _nothing_allowed(estimator: Estimator, limit_bytes: float | None) -> Infeasible:
    """Returns the error that says why there is no plan: the latencies allow none, or the memory
    limit is too low, and by how much.
    """
    request, table = estimator.request, estimator.table
    is_allowed = np.isfinite(estimator.forward + estimator.backward)
    tokens = np.where(is_allowed, estimator.slice_tokens, np.inf)
    longest = least_longest(tokens, request.batch_size, request.batch_slices)
    if limit_bytes is None or not np.isfinite(longest):
        return Infeasible(
            f"no allowed slices cover {request.batch_size} sequences of {request.seq_len} tokens: "
            f"the latencies are for up to {len(table.forward)} sequences, slices of "
            f"{table.unit_tokens * table.forward.shape[1]} tokens and contexts of "
            f"{table.unit_tokens * (table.forward.shape[2] - 1)}, less what is null."
        )
    memory = estimator.memory
    batch_slices = request.batch_slices or (1,) * request.batch_size
    saved = min(estimator.least_activation_bytes(batch_slices, n) for n in request.schedules)
    least = max(memory.step_bytes(saved, longest), limit_bytes)
    return Infeasible(
        f"a memory limit of {limit_bytes / GIB:.3g} GiB is {(least - limit_bytes) / GIB:.3g} GiB "
        f"too little for any plan: {memory.fixed_bytes / GIB:.3g} GiB for parameters, gradients, "
        f"optimiser and loss, {saved / GIB:.3g} GiB saved for the backward passes of "
        f"{request.batch_size} x {request.seq_len} tokens, "
        f"{memory.working_bytes_per_token * longest / GIB:.3g} GiB for a slice of {longest:.0f}; "
        "fewer sequences, shorter ones, more stages or more shards need less."
    )
