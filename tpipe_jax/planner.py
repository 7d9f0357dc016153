"""From the times of slices to the plan of a step, and what plainer plans would take. No jax."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tpipe_jax.config import UserError
from tpipe_jax.latency import LatencyTable, Memory
from tpipe_jax.plans import Nested, Plan, PlanRequest, Prediction
from tpipe_jax.plans import uniform as uniform_parts
from tpipe_jax.schedule import Timeline, simulate, slice_order, terapipe
from tpipe_jax.slicer import ROUNDING, Slicing, fastest_slicing, least_longest

GIB = 2**30


@dataclass(frozen=True)
class Alternative:
    """A plan of uniform slices, to compare with."""

    batch_slices: int
    token_slices: int
    """Of each batch slice."""
    step_seconds: float

    @classmethod
    def of(cls, plan: Plan) -> "Alternative":
        """What is shown of a plan with a prediction."""
        return cls(len(plan.batch_slices), len(plan.token_slices[0]), _step_seconds(plan))


@dataclass(frozen=True)
class Planning:
    """A plan with its prediction, and how it was found."""

    plan: Plan
    unsliced: Alternative | None
    """Whole sequences, in the best number of batch slices; None where that is not allowed, or token
    slices are given.
    """
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
    cuts, times = _times(table, request)
    if memory_limit_bytes is not None:
        fits = _fits(table, request, memory_limit_bytes, cuts)[: len(times[0])]
        times = np.where(fits, times[0], np.inf), np.where(fits, times[1], np.inf)
    slicing = fastest_slicing(
        *times, request.batch_size, stage_factors, batch_slices=request.batch_slices
    )
    search_seconds = time.perf_counter() - start
    if slicing is None:
        raise _nothing_allowed(table, request, memory_limit_bytes, cuts)

    def plan_of(slicing: Slicing) -> Plan:
        return _predicted(table, request, stage_factors, cuts, times, slicing)

    def best_uniform(token_counts: Iterable[int]) -> Plan | None:
        if request.token_slices is not None:
            return None
        best = _best_uniform(*times, request, stage_factors, token_counts)
        return plan_of(best) if best else None

    unsliced, uniform = best_uniform([1]), best_uniform(range(1, len(cuts)))
    plan = plan_of(slicing)
    if min(stage_factors) < max(stage_factors) and request.batch_slices is None:
        # The slicer minimises a bound then, and a plainer plan may turn out faster.
        plan = min((p for p in (plan, uniform, unsliced) if p), key=_step_seconds)
    return Planning(
        _with_bound(plan, slicing.lower_bound_seconds),
        Alternative.of(unsliced) if unsliced else None,
        Alternative.of(uniform) if uniform else None,
        slicing.num_solves,
        search_seconds,
    )


def _step_seconds(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_seconds


def _predicted(
    table: LatencyTable,
    request: PlanRequest,
    stage_factors: Sequence[float],
    cuts: np.ndarray,
    times: tuple[np.ndarray, np.ndarray],
    slicing: Slicing,
) -> Plan:
    """A slicing as a plan in tokens, with the times of its slices and the time that it takes."""
    token_slices = tuple(tuple(np.diff(cuts[list(own)]).tolist()) for own in slicing.cuts)
    plan = Plan(request.num_stages, slicing.batch_slices, token_slices)
    outside_seconds, transfer = _beside_slices(table, request)
    forward, backward = (_of_slices(slicing, t) for t in times)
    prediction = Prediction(
        step_seconds=slicing.seconds + outside_seconds,
        outside_seconds=outside_seconds,
        slice_forward_seconds=forward,
        slice_backward_seconds=backward,
        slice_transfer_seconds=tuple(
            tuple(transfer(b * n) for n in own)
            for b, own in zip(plan.batch_slices, token_slices, strict=True)
        ),
        is_optimal=False,
        lower_bound_seconds=0.0,
    )
    plan = replace(plan, prediction=prediction)
    if min(stage_factors) < max(stage_factors):  # the formula of the slicer is a bound then
        seconds = predicted_timeline(plan, stage_factors).step_seconds + outside_seconds
        plan = replace(plan, prediction=replace(prediction, step_seconds=seconds))
    return plan


def _with_bound(plan: Plan, lower_bound_seconds: float) -> Plan:
    """The plan with what no plan can be faster than, in its pipeline."""
    prediction = plan.prediction
    assert prediction is not None
    bound = lower_bound_seconds + prediction.outside_seconds
    is_optimal = bound >= prediction.step_seconds * (1 - 10 * ROUNDING)
    return replace(
        plan,
        prediction=replace(prediction, is_optimal=is_optimal, lower_bound_seconds=bound),
    )


def _of_slices(slicing: Slicing, times: np.ndarray) -> Nested:
    """The times of the slices of a slicing, from those of all."""
    return tuple(
        tuple(float(times[b - 1, stop, start]) for start, stop in itertools.pairwise(own))
        for b, own in zip(slicing.batch_slices, slicing.cuts, strict=True)
    )


def _nothing_allowed(
    table: LatencyTable, request: PlanRequest, limit_bytes: float | None, cuts: np.ndarray
) -> UserError:
    """Why there is no plan: the memory, and then by how much, or the latencies."""
    _, (forward, backward) = _times(table, request)
    tokens = _slice_tokens(request, cuts)[: len(forward)]
    sizes = np.where(np.isfinite(forward + backward), tokens, np.inf)
    longest = least_longest(sizes, request.batch_size, request.batch_slices)
    if limit_bytes is None or not np.isfinite(longest):
        return UserError(
            f"no allowed slices cover {request.batch_size} sequences of {request.seq_len} tokens: "
            f"the latencies are for up to {len(table.forward)} sequences, slices of "
            f"{table.unit_tokens * table.forward.shape[1]} tokens and contexts of "
            f"{table.unit_tokens * (table.forward.shape[2] - 1)}, less what is null."
        )
    memory, batch_tokens = _memory(table), request.batch_size * request.seq_len
    least = memory.step_bytes(batch_tokens, longest)
    return UserError(
        f"a memory limit of {limit_bytes / GIB:.3g} GiB is {(least - limit_bytes) / GIB:.3g} GiB "
        f"too little for any plan: {memory.fixed_bytes / GIB:.3g} GiB for parameters, gradients, "
        f"optimiser and loss, {memory.saved_bytes_per_token * batch_tokens / GIB:.3g} GiB saved "
        f"for the backward pass of {request.batch_size} x {request.seq_len} tokens, "
        f"{memory.working_bytes_per_token * longest / GIB:.3g} GiB for a slice of {longest:.0f}; "
        "fewer sequences, shorter ones, more stages or more shards need less."
    )


def predicted_timeline(plan: Plan, stage_factors: Sequence[float]) -> Timeline:
    """The pipeline's part of a step, from a plan that has a prediction."""
    assert plan.prediction is not None
    forward, backward, transfer = (
        [nested[m][n] for m, n in slice_order(plan)]
        for nested in (
            plan.prediction.slice_forward_seconds,
            plan.prediction.slice_backward_seconds,
            plan.prediction.slice_transfer_seconds,
        )
    )
    work = ([t - x for t, x in zip(times, transfer, strict=True)] for times in (forward, backward))
    return simulate(terapipe(plan), *work, stage_factors=stage_factors, transfer_seconds=transfer)


def _times(
    table: LatencyTable, request: PlanRequest
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Where a sequence may be cut, in tokens, and seconds `[b - 1, stop, start]` between the cuts,
    forward and backward.
    """
    if request.token_slices is not None:
        assert table.profile is not None
        cuts = np.cumsum([0, *request.token_slices])
        b = np.arange(1, request.batch_size + 1)[:, None, None]
        stop, start = cuts[None, :, None], cuts[None, None, :]
        times = table.profile.slice_seconds(b, np.maximum(stop - start, 1), start)
        is_next = np.eye(len(cuts), k=-1, dtype=bool)
        return cuts, (np.where(is_next, times[0], np.inf), np.where(is_next, times[1], np.inf))
    num_units, rest = divmod(request.seq_len, table.unit_tokens)
    if rest:
        raise UserError(
            f"a sequence of {request.seq_len} tokens is not a multiple of the unit of the "
            f"latencies, {table.unit_tokens} tokens: plan for another length, or measure another "
            "unit."
        )
    return np.arange(num_units + 1) * table.unit_tokens, table.by_cuts(num_units)


def _slice_tokens(request: PlanRequest, cuts: np.ndarray) -> np.ndarray:
    """Tokens of a slice of b sequences, `[b - 1, stop, start]`."""
    sizes = np.arange(1, request.batch_size + 1)[:, None, None]
    return sizes * (cuts[None, :, None] - cuts[None, None, :])


def _memory(table: LatencyTable) -> Memory:
    if table.profile is None:
        raise UserError(
            "the latencies come without the memory that was measured with them, so a limit cannot "
            "be kept: leave it out, or plan from a config."
        )
    return table.profile.memory


def _fits(
    table: LatencyTable, request: PlanRequest, limit_bytes: float, cuts: np.ndarray
) -> np.ndarray:
    """Which slices `[b - 1, stop, start]` leave a step within the memory."""
    batch_tokens = request.batch_size * request.seq_len
    return _memory(table).step_bytes(batch_tokens, _slice_tokens(request, cuts)) <= limit_bytes


def _beside_slices(
    table: LatencyTable, request: PlanRequest
) -> tuple[float, Callable[[int], float]]:
    """Seconds of a step outside its slices, and of handing so many tokens over.

    The former is known for the batch that was measured, and 0 for others.
    """
    profile = table.profile
    if profile is None:
        return 0.0, lambda tokens: 0.0
    is_same = (profile.batch_size, profile.seq_len) == (request.batch_size, request.seq_len)
    constant, per_token = profile.transfer
    return (
        profile.outside_seconds if is_same else 0.0,
        lambda tokens: constant + per_token * tokens,
    )


def _best_uniform(
    forward: np.ndarray,
    backward: np.ndarray,
    request: PlanRequest,
    stage_factors: Sequence[float],
    token_counts: Iterable[int],
) -> Slicing | None:
    """The fastest slicing into equal batch slices with one of these numbers of equal slices."""
    num_units = forward.shape[1] - 1
    slowest = max(stage_factors)
    wait = sum(stage_factors) - slowest
    best = None
    for num_tokens in token_counts:
        cuts = np.cumsum([0, *uniform_parts(num_units, num_tokens)])
        f, b = (t[:, cuts[1:], cuts[:-1]] for t in (forward, backward))  # [sizes, token slices]
        work, longest_f, longest_b = (f + b).sum(1), f.max(1), b.max(1)
        for num_batch in range(1, request.batch_size + 1):
            sizes = uniform_parts(request.batch_size, num_batch)
            if sizes[0] > len(f):
                continue
            rows = np.array(sizes) - 1
            longest = longest_f[rows].max() + longest_b[rows].max()
            seconds = float(slowest * work[rows].sum() + wait * longest)
            if np.isfinite(seconds) and (best is None or seconds < best.seconds):
                best = Slicing(sizes, (tuple(cuts.tolist()),) * num_batch, seconds, 0.0, 0)
    return best
