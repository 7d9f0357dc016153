"""From the times of slices to the plan of a step, and what plainer plans would take. No jax."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tpipe_jax.config import UserError
from tpipe_jax.latency import LatencyTable
from tpipe_jax.plan import Nested, Plan, PlanRequest, Prediction, uniform
from tpipe_jax.schedule import Timeline, simulate, terapipe
from tpipe_jax.slicer import ROUNDING, Slicing, fastest_slicing

GIB = 2**30


@dataclass(frozen=True)
class Alternative:
    """A plan of uniform slices, to compare with."""

    batch_slices: int
    token_slices: int
    """Of each batch slice."""
    step_seconds: float


@dataclass(frozen=True)
class Planning:
    """A plan with its prediction, and how it was found."""

    plan: Plan
    unsliced: Alternative | None
    """Whole sequences, in the best number of batch slices; None where that is not allowed."""
    best_uniform: Alternative | None
    num_solves: int
    search_seconds: float


def find_plan(
    table: LatencyTable,
    request: PlanRequest,
    stage_factors: Sequence[float],
    memory_limit_bytes: float | None = None,
) -> Planning:
    """The fastest of all plans that keep to the request and to the memory.

    Raises `UserError` if there is none.
    """
    start = time.perf_counter()
    cuts, forward, backward = _times(table, request)
    if memory_limit_bytes is not None:
        fits = _fits(table, request, memory_limit_bytes, cuts)
        forward, backward = (np.where(fits, t, np.inf) for t in (forward, backward))
    slicing = fastest_slicing(
        forward, backward, request.batch_size, stage_factors, batch_slices=request.batch_slices
    )
    search_seconds = time.perf_counter() - start
    if slicing is None:
        raise UserError(
            f"no allowed slices cover {request.batch_size} sequences of {request.seq_len} tokens: "
            f"the latencies are for up to {len(table.forward)} sequences, slices of "
            f"{table.unit_tokens * table.forward.shape[1]} tokens and contexts of "
            f"{table.unit_tokens * (table.forward.shape[2] - 1)}, less what is null"
            + (" and what the memory has no room for." if memory_limit_bytes else ".")
        )
    plan = Plan(
        request.num_stages,
        slicing.batch_slices,
        tuple(tuple(np.diff(cuts[list(own)]).tolist()) for own in slicing.cuts),
    )
    outside_seconds, transfer = _beside_slices(table, request)
    prediction = Prediction(
        step_seconds=slicing.seconds + outside_seconds,
        outside_seconds=outside_seconds,
        slice_forward_seconds=_of_slices(slicing, forward),
        slice_backward_seconds=_of_slices(slicing, backward),
        slice_transfer_seconds=tuple(
            tuple(transfer(b * n) for n in own)
            for b, own in zip(plan.batch_slices, plan.token_slices, strict=True)
        ),
        is_optimal=slicing.is_optimal,
        lower_bound_seconds=slicing.lower_bound_seconds + outside_seconds,
    )
    plan = replace(plan, prediction=prediction)
    if min(stage_factors) < max(stage_factors):
        plan = _with_makespan(plan, stage_factors)

    def best_uniform(token_counts: Sequence[int]) -> Alternative | None:
        best = _best_uniform(forward, backward, request, stage_factors, token_counts)
        return best and replace(best, step_seconds=best.step_seconds + outside_seconds)

    return Planning(
        plan,
        unsliced=best_uniform([1]),
        best_uniform=best_uniform(range(1, len(cuts))),
        num_solves=slicing.num_solves,
        search_seconds=search_seconds,
    )


def _of_slices(slicing: Slicing, times: np.ndarray) -> Nested:
    """The times of the slices of a slicing, from those of all."""
    return tuple(
        tuple(float(times[b - 1, stop, start]) for start, stop in itertools.pairwise(own))
        for b, own in zip(slicing.batch_slices, slicing.cuts, strict=True)
    )


def _with_makespan(plan: Plan, stage_factors: Sequence[float]) -> Plan:
    """The plan with its simulated time, which for unequal stages the slicer only bounds."""
    prediction = plan.prediction
    assert prediction is not None
    step_seconds = predicted_timeline(plan, stage_factors).step_seconds + prediction.outside_seconds
    lower_bound_seconds = min(prediction.lower_bound_seconds, step_seconds)
    prediction = replace(
        prediction,
        step_seconds=step_seconds,
        is_optimal=lower_bound_seconds >= step_seconds * (1 - ROUNDING),
        lower_bound_seconds=lower_bound_seconds,
    )
    return replace(plan, prediction=prediction)


def predicted_timeline(plan: Plan, stage_factors: Sequence[float]) -> Timeline:
    """The pipeline's part of a step, from a plan that has a prediction."""
    assert plan.prediction is not None
    forward, backward, transfer = (
        list(itertools.chain.from_iterable(nested))
        for nested in (
            plan.prediction.slice_forward_seconds,
            plan.prediction.slice_backward_seconds,
            plan.prediction.slice_transfer_seconds,
        )
    )
    work = ([t - x for t, x in zip(times, transfer, strict=True)] for times in (forward, backward))
    return simulate(terapipe(plan), *work, stage_factors=stage_factors, transfer_seconds=transfer)


def _times(table: LatencyTable, request: PlanRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a sequence may be cut, in tokens, and seconds `[b - 1, stop, start]` between the cuts,
    forward and backward.
    """
    if request.token_slices is not None and table.profile:
        cuts = np.cumsum([0, *request.token_slices])
        b = np.arange(1, request.batch_size + 1)[:, None, None]
        stop, start = cuts[None, :, None], cuts[None, None, :]
        times = table.profile.slice_seconds(b, np.maximum(stop - start, 1), start)
        is_next = np.eye(len(cuts), k=-1, dtype=bool)
        forward, backward = (np.where(is_next, t, np.inf) for t in times)
        return cuts, forward, backward
    num_units, rest = divmod(request.seq_len, table.unit_tokens)
    if rest:
        raise UserError(
            f"a sequence of {request.seq_len} tokens is not a multiple of the unit of the "
            f"latencies, {table.unit_tokens} tokens: plan for another length, or measure another "
            "unit."
        )
    return np.arange(num_units + 1) * table.unit_tokens, *table.by_cuts(num_units)


def _fits(
    table: LatencyTable, request: PlanRequest, limit_bytes: float, cuts: np.ndarray
) -> np.ndarray:
    """Which slices `[b - 1, stop, start]` leave a step within the memory."""
    memory = table.profile.memory if table.profile else None
    if memory is None:
        raise UserError(
            "the latencies come without the memory that was measured with them, so a limit cannot "
            "be kept: leave it out, or plan from a config."
        )
    batch_tokens = request.batch_size * request.seq_len
    sizes = np.arange(1, request.batch_size + 1)[:, None, None]
    slice_tokens = sizes * (cuts[None, :, None] - cuts[None, None, :])
    fits = memory.step_bytes(batch_tokens, slice_tokens) <= limit_bytes
    smallest = np.diff(cuts).min()
    least = memory.step_bytes(batch_tokens, smallest)
    if least > limit_bytes:
        raise UserError(
            f"a memory limit of {limit_bytes / GIB:.3g} GiB is {(least - limit_bytes) / GIB:.3g} "
            f"GiB too little for any plan: {memory.fixed_bytes / GIB:.3g} GiB for parameters, "
            "gradients, optimiser and loss, "
            f"{memory.saved_bytes_per_token * batch_tokens / GIB:.3g} GiB saved for the backward "
            f"pass of {request.batch_size} x {request.seq_len} tokens, "
            f"{memory.working_bytes_per_token * smallest / GIB:.3g} GiB for a slice of {smallest}; "
            "fewer sequences, shorter ones, more stages or more shards need less."
        )
    return fits


def _beside_slices(
    table: LatencyTable, request: PlanRequest
) -> tuple[float, Callable[[int], float]]:
    """Seconds of a step outside its slices, and of handing so many tokens over."""
    profile = table.profile
    if profile is None:
        return 0.0, lambda tokens: 0.0
    is_same = (profile.batch_size, profile.seq_len) == (request.batch_size, request.seq_len)
    constant, per_token = profile.hand_over
    return (
        profile.outside_seconds if is_same else 0.0,
        lambda tokens: constant + per_token * tokens,
    )


def _best_uniform(
    forward: np.ndarray,
    backward: np.ndarray,
    request: PlanRequest,
    stage_factors: Sequence[float],
    token_counts: Sequence[int],
) -> Alternative | None:
    """The fastest plan of equal batch slices with one of these numbers of equal token slices."""
    num_units = forward.shape[1] - 1
    slowest = max(stage_factors)
    wait = sum(stage_factors) - slowest
    best = None
    for num_tokens in token_counts:
        stop = np.cumsum(uniform(num_units, num_tokens))
        start = np.concatenate([[0], stop[:-1]])
        f, b = forward[:, stop, start], backward[:, stop, start]  # [sizes, token slices]
        work, longest_f, longest_b = (f + b).sum(1), f.max(1), b.max(1)
        for num_batch in range(1, request.batch_size + 1):
            sizes = np.array(uniform(request.batch_size, num_batch))
            if sizes[0] > len(f):
                continue
            longest = longest_f[sizes - 1].max() + longest_b[sizes - 1].max()
            seconds = float(slowest * work[sizes - 1].sum() + wait * longest)
            if np.isfinite(seconds) and (best is None or seconds < best.step_seconds):
                best = Alternative(num_batch, num_tokens, seconds)
    return best
