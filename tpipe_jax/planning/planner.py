"""Finds the plan of a step from the times of slices, and plainer plans to compare. No jax."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tpipe_jax.config.settings import ScheduleName
from tpipe_jax.errors import Infeasible, UserError
from tpipe_jax.planning.estimator import Estimator
from tpipe_jax.planning.latency import DEFERRED, LatencyTable
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.schedule_search import (
    Option,
    best_uniform_plan,
    search_schedule,
    step_seconds,
    within_memory,
)
from tpipe_jax.planning.slicer import least_longest

GIB = 2**30
TIE = 0.01  # plans count as equally fast within this fraction of the predicted time


@dataclass(frozen=True)
class Alternative:
    """Numbers of slices and time of a plan with uniform slices, to compare with the best plan."""

    batch_slices: int
    token_slices: int
    """Token slices of each batch slice."""
    step_seconds: float

    @classmethod
    def of(cls, plan: Plan) -> "Alternative":
        """Returns the figures of a plan that has a prediction."""
        return cls(len(plan.batch_slices), len(plan.token_slices[0]), step_seconds(plan))


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


def find_plan(
    table: LatencyTable,
    request: PlanRequest,
    stage_factors: Sequence[float],
    memory_limit_bytes: float | None = None,
) -> Planning:
    """Returns the fastest plan that keeps to the request and to the memory limit.

    Among schedules that are equally fast, within `TIE`, it takes the `preferred` one. Raises
    `UserError` if there is no such plan.
    """
    start = time.perf_counter()
    _check_schedule(table, request)
    estimator = Estimator.of(table, request, stage_factors)
    found = [search_schedule(name, estimator, memory_limit_bytes) for name in request.schedules]
    options = [option for option, _ in found if option]
    fitting = [option for option in options if option.fits]
    if not fitting:
        raise _nothing_allowed(estimator, memory_limit_bytes)
    fastest = min(step_seconds(option.plan) for option in fitting)
    as_fast = [o for o in fitting if step_seconds(o.plan) <= (1 + TIE) * fastest]
    usual = preferred(request.num_stages)
    chosen = min(as_fast, key=lambda o: (o.plan.schedule != usual, step_seconds(o.plan)))
    allowed = within_memory(estimator, memory_limit_bytes)
    unsliced, uniform = (
        best_uniform_plan(allowed, counts) for counts in ([1], range(1, len(estimator.cuts)))
    )
    return Planning(
        chosen.plan,
        tuple(estimator.chunk_factors(chosen.plan.num_chunks)),
        tuple(options),
        Alternative.of(unsliced) if unsliced else None,
        Alternative.of(uniform) if uniform else None,
        num_solves=sum(num_solves for _, num_solves in found),
        search_seconds=time.perf_counter() - start,
    )


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
