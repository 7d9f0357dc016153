"""Searches for the best plan under a schedule, and plainer plans to compare with. No jax."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tpipe_jax.config.settings import ScheduleName
from tpipe_jax.planning.bounds import MAX_CELLS, most_slices
from tpipe_jax.planning.estimator import Estimator, predicted_timeline
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.settings import uniform as uniform_parts
from tpipe_jax.planning.slicer import ROUNDING, Slicing, fastest_slicing, least_work

MOST_UNIFORM = 8  # uniform slicings that are tried for each size of batch slices
MOST_MOVES = 100  # moves of a cut by a unit that are tried
MOST_SIMULATED = 16 * MAX_CELLS  # cells of schedules that are simulated, in about a minute
MOST_COUNTS = 64  # sequences whose numbers of equal batch slices are all tried
MOST_PLAINER = 8  # uniform plans that are kept beside the best
# Uniform plans are kept if they are slower than the best by at most this fraction. It is what the
# predicted time of a plan may be off whose slices were not timed (docs/planning.md).
NEAR = 0.05


@dataclass(frozen=True)
class Option:
    """The best plan that was found under a schedule."""

    plan: Plan
    bubble: float
    activation_bytes: float | None
    """What a stage stores for sequences in the pipeline; None where that is not known."""
    fits: bool
    """Whether a step under the plan keeps to the memory limit."""
    plainer: tuple[Plan, ...] = ()
    """Uniform plans that are nearly as fast: the fastest, and the simplest to run."""


def step_seconds(plan: Plan) -> float:
    """Returns the predicted time of a step; the plan must have a prediction."""
    assert plan.prediction is not None
    return plan.prediction.step_seconds


def complexity(plan: Plan) -> tuple[int, int]:
    """Returns how many programs a plan needs for its slices, and how many slices it has."""
    return len(plan.shapes) * plan.num_chunks, sum(map(len, plan.token_slices)) * plan.num_chunks


def search_schedule(
    schedule: ScheduleName, estimator: Estimator, limit_bytes: float | None
) -> tuple[Option | None, int]:
    """Returns the best plan under a schedule, as an option, and the number of dynamic programmes
    solved.

    If no plan keeps to the memory limit, the best plan without a limit is returned, marked as not
    fitting. The option is None if no slices are allowed, or if their times are not known.
    """
    if schedule == "1f1b-deferred" and estimator.deferred is None:
        return None, 0  # the times of its slices are not known
    search = _terapipe if schedule == "terapipe" else partial(_best_found, schedule)
    plan, plainer, num_solves = search(estimator, limit_bytes)
    fits = plan is not None
    if plan is None and limit_bytes is not None:
        plan, plainer, more = search(estimator, None)
        num_solves += more
    if plan is None:
        return None, num_solves
    bubble = predicted_timeline(plan, estimator.chunk_factors(plan.num_chunks)).bubble
    num_bytes = estimator.activation_bytes(plan)
    return Option(plan, bubble, num_bytes, fits, _near(plan, plainer)), num_solves


def _near(best: Plan, others: list[Plan]) -> tuple[Plan, ...]:
    """Returns the fastest of the others, and the simplest, if they are nearly as fast as the best.
    What is proven of all plans under its schedule holds for them too.
    """
    assert best.prediction is not None
    bound = best.prediction.lower_bound_seconds - best.prediction.outside_seconds
    near = [plan for plan in others if step_seconds(plan) <= (1 + NEAR) * step_seconds(best)]
    near.sort(key=lambda plan: (complexity(plan), step_seconds(plan)))
    fastest = sorted(near, key=step_seconds)[:1]
    return tuple(_with_bound(plan, bound) for plan in (*fastest, *near[:MOST_PLAINER]))


Found = tuple[
    Plan | None, list[Plan], int
]  # the best plan, others, and how many programmes were solved


def _terapipe(estimator: Estimator, limit_bytes: float | None) -> Found:
    """Returns the fastest plan under `terapipe`, with a proven bound, and uniform plans."""
    request, factors = estimator.request, estimator.stage_factors
    estimator = within_memory(estimator, limit_bytes)
    slicing = fastest_slicing(
        *estimator.times, request.batch_size, factors, batch_slices=request.batch_slices
    )
    if slicing is None:
        return None, [], 0
    plainer = _plainer(estimator, (1 + NEAR) * slicing.seconds + NEAR * estimator.outside_seconds)
    if not _is_possible(estimator, slicing):
        plan = min(plainer, key=step_seconds, default=None)
        if plan is None:
            return None, [], slicing.num_solves
    else:
        plan = estimator.plan_of(slicing, "terapipe")
    if min(factors) < max(factors) and request.batch_slices is None:
        # The slicer minimises an upper bound then, so a uniform plan may turn out faster.
        uniform = (
            best_uniform_plan(estimator, counts) for counts in ([1], range(1, len(estimator.cuts)))
        )
        plan = min((plan, *(p for p in uniform if p), *plainer), key=step_seconds)
    return _with_bound(plan, slicing.lower_bound_seconds), plainer, slicing.num_solves


def _plainer(estimator: Estimator, most_seconds: float) -> list[Plan]:
    """Returns the fastest uniform plan under `terapipe`, and the simplest, whose slices take at
    most so long.
    """
    request = estimator.request
    if request.token_slices is not None:
        return []
    batches = _equal_batch_slices(request.batch_size)
    if request.batch_slices is not None:
        batches = [request.batch_slices]
    found = [
        slicing
        for slicing in _uniform(estimator, batches, range(1, len(estimator.cuts)))
        if slicing.seconds <= most_seconds
    ]
    found = [*found[:1], *sorted(found, key=_slicing_complexity)[:MOST_PLAINER]]
    return [estimator.plan_of(slicing, "terapipe") for slicing in found]


def _equal_batch_slices(batch_size: int) -> list[tuple[int, ...]]:
    """Returns equal batch slices in all numbers; of many sequences, only the fewest of a size."""
    counts = range(1, batch_size + 1)
    if batch_size > MOST_COUNTS:
        counts = sorted({-(-batch_size // size) for size in counts})
    return [uniform_parts(batch_size, n) for n in counts]


def _is_possible(estimator: Estimator, slicing: Slicing, num_chunks: int = 1) -> bool:
    """Whether a schedule can have so many slices."""
    num_slices = num_chunks * sum(len(cuts) - 1 for cuts in slicing.cuts)
    return num_slices <= most_slices(estimator.request.num_stages)


def _affordable(
    estimator: Estimator, options: list[tuple[int, Slicing]]
) -> list[tuple[int, Slicing]]:
    """Returns those of the slicings, each with its number of chunks, that a schedule can have, and
    of these only as many as can be simulated soon: the fastest first, as far as a formula tells.
    """
    P, left, kept = estimator.request.num_stages, MOST_SIMULATED, []
    for num_chunks, slicing in sorted(options, key=lambda option: option[1].seconds):
        left -= P * (P + num_chunks * sum(map(len, slicing.cuts)))
        if _is_possible(estimator, slicing, num_chunks) and (left > 0 or not kept):
            kept.append((num_chunks, slicing))
    return kept


def _slicing_complexity(slicing: Slicing) -> tuple[int, int, float]:
    """Returns the `complexity` of a plan with these slices, and the seconds of the slicing."""
    pairs = set(zip(slicing.batch_slices, slicing.cuts, strict=True))
    shapes = {(b, n) for b, cuts in pairs for n in np.diff(cuts).tolist()}
    return len(shapes), sum(len(cuts) - 1 for cuts in slicing.cuts), slicing.seconds


def _best_found(schedule: ScheduleName, estimator: Estimator, limit_bytes: float | None) -> Found:
    """Returns the best plan found under a schedule other than `terapipe`, and others.

    There are several candidates for each size of batch slices and number of chunks: the slicing
    that is fastest if all goes forward before any goes backward, and some slicings into equal
    slices. The best candidate is made faster by moving cuts.
    """
    slicings: list[tuple[int, Slicing]] = []  # each with its number of chunks
    is_interleaved = schedule == "interleaved"
    for num_chunks in estimator.request.chunk_options if is_interleaved else (1,):
        for sizes in _batch_slices(estimator, at_least=1 if is_interleaved else 2):
            allowed = within_memory(estimator, limit_bytes, schedule, sizes)
            fastest = fastest_slicing(
                *allowed.times,
                sum(sizes),
                estimator.stage_factors,
                batch_slices=sizes,
                num_chunks=num_chunks,
            )
            found = [fastest] if fastest else []
            if estimator.request.token_slices is None:
                uniform = _uniform(allowed, [sizes], range(1, len(estimator.cuts)))
                found += uniform[:MOST_UNIFORM]
                found += sorted(uniform, key=_slicing_complexity)[:MOST_UNIFORM]
                found += uniform and [max(uniform, key=lambda slicing: len(slicing.cuts[0]))]
            slicings += [(num_chunks, slicing) for slicing in found]
    num_solves = sum(slicing.num_solves for _, slicing in slicings)

    def seconds(num_chunks: int, slicing: Slicing) -> float:
        plan = estimator.plan_of(slicing, schedule, num_chunks)
        if limit_bytes is not None and estimator.step_bytes(plan) > limit_bytes:
            return np.inf
        return step_seconds(plan)

    known = [(seconds(*option), *option) for option in _affordable(estimator, slicings)]
    least, num_chunks, best = min(known, key=lambda found: found[0], default=(np.inf, 1, None))
    if best is None or least == np.inf:
        return None, [], num_solves
    plainer = [
        estimator.plan_of(slicing, schedule, chunks)
        for seconds_, chunks, slicing in known
        if seconds_ <= (1 + NEAR) * least and slicing.num_solves == 0  # uniform ones
    ]
    best = _with_moved_cuts(estimator, best, least, partial(seconds, num_chunks))
    plan = estimator.plan_of(best, schedule, num_chunks)
    return _with_bound(plan, _lower_bound_seconds(estimator, plan)), plainer, num_solves


def _with_moved_cuts(
    estimator: Estimator, best: Slicing, least: float, seconds: Callable[[Slicing], float]
) -> Slicing:
    """Moves one cut after another by a unit and keeps each move that makes the slicing faster.

    Stops when no move makes it faster, or when `MOST_MOVES` have been tried.
    """
    P = estimator.request.num_stages
    cells = P * (P + sum(map(len, best.cuts)))
    most_moves, num_tried, has_improved = min(MOST_MOVES, MOST_SIMULATED // cells), 0, True
    while has_improved:
        has_improved = False
        for place in _places(estimator, best):
            moved = _moved(estimator, best, *place)
            if moved is None:
                continue
            if num_tried == most_moves:
                return best
            num_tried += 1
            if (after := seconds(moved)) < least:
                least, best, has_improved = after, moved, True
    return best


def _lower_bound_seconds(estimator: Estimator, plan: Plan) -> float:
    """Returns a time that no slices can beat under the plan's schedule and number of chunks.

    A stage cannot start before its first slice has arrived. The step cannot end before the last
    slice is back on the first stage. In between the stage does all its work. With deferred
    gradients of weights there are two such bounds, since the stage may compute these gradients
    while its last slice goes back: one counts the way back but not the gradients, the other counts
    the gradients but not the way back.
    """
    request, P = estimator.request, plan.num_stages
    (forward, backward), weights = estimator.times, None
    if plan.schedule == "1f1b-deferred":
        assert estimator.deferred
        backward, weights = estimator.deferred
    to_come, to_go = (float(t[np.isfinite(t)].min()) for t in (forward, backward))
    ways = [(backward, to_come + to_go)]
    ways += [] if weights is None else [(backward + weights, to_come)]
    factors = np.reshape(estimator.chunk_factors(plan.num_chunks), (plan.num_chunks, P))
    whole, first = factors.sum(0).tolist(), factors[0].tolist()
    before = list(itertools.accumulate(first[:-1], initial=0.0))  # sums over the stages before each
    bounds = []
    for back, wait in ways:
        work = least_work(forward, back, request.batch_size, request.batch_slices)
        bounds += [a * work + b * wait for a, b in zip(whole, before, strict=True)]
    return max(bounds)


def _batch_slices(estimator: Estimator, at_least: int) -> list[tuple[int, ...]]:
    """Returns the batch slices to try: the given ones, or at least `at_least` equal ones."""
    request = estimator.request
    if request.batch_slices is not None:
        return [request.batch_slices]
    counts = {
        -(-request.batch_size // size)
        for size in range(1, len(estimator.forward) + 1)
        if size & (size - 1) == 0 and at_least * size <= request.batch_size
    }
    return [uniform_parts(request.batch_size, count) for count in sorted(counts)]


def _places(estimator: Estimator, slicing: Slicing) -> list[tuple[int, int, int]]:
    """Returns the moves to try: (size of the batch slices, index of the cut, step in units)."""
    if estimator.request.token_slices is not None:
        return []
    cuts = dict(zip(slicing.batch_slices, slicing.cuts, strict=True))
    return [
        (size, i, step)
        for size, own in sorted(cuts.items())
        for i in range(1, len(own) - 1)
        for step in (-1, 1)
    ]


def _moved(estimator: Estimator, slicing: Slicing, size: int, i: int, step: int) -> Slicing | None:
    """Returns the slicing with cut `i` moved in all batch slices of a size, if that is allowed."""
    sizes = slicing.batch_slices
    own = dict(zip(sizes, slicing.cuts, strict=True))[size]
    moved = (*own[:i], own[i] + step, *own[i + 1 :])
    pairs = list(itertools.pairwise(moved))
    is_allowed = all(start < stop for start, stop in pairs) and all(
        np.isfinite(t[size - 1, stop, start]) for start, stop in pairs for t in estimator.times
    )
    if not is_allowed:
        return None
    cuts = (moved if n == size else c for n, c in zip(sizes, slicing.cuts, strict=True))
    return replace(slicing, cuts=tuple(cuts))


def within_memory(
    estimator: Estimator,
    limit_bytes: float | None,
    schedule: ScheduleName = "terapipe",
    batch_slices: tuple[int, ...] | None = None,
) -> Estimator:
    """Leaves out slices that cannot fit: they exceed the limit even with the least activations of
    any plan with these batch slices, which are those of the shortest token slices.
    """
    if limit_bytes is None:
        return estimator
    batch_slices = batch_slices or (estimator.request.batch_size,)
    kept = estimator.least_activation_bytes(batch_slices, schedule)
    needed = estimator.memory.step_bytes(kept, estimator.slice_tokens)
    return estimator.without(needed > limit_bytes)


def _with_bound(plan: Plan, lower_bound_seconds: float) -> Plan:
    """Returns the plan with a lower bound of the pipeline's time under its schedule."""
    prediction = plan.prediction
    assert prediction is not None
    bound = lower_bound_seconds + prediction.outside_seconds
    is_optimal = bound >= prediction.step_seconds * (1 - 10 * ROUNDING)
    return replace(
        plan,
        prediction=replace(prediction, is_optimal=is_optimal, lower_bound_seconds=bound),
    )


def best_uniform_plan(estimator: Estimator, token_counts: Iterable[int]) -> Plan | None:
    """Returns the fastest plan under `terapipe` of equal batch slices, each with equal token
    slices, whose number is one of `token_counts`.

    None where the request names token slices, or no such plan is allowed. Batch slices in the
    request are ignored.
    """
    request = estimator.request
    if request.token_slices is not None:
        return None
    found = _uniform(estimator, _equal_batch_slices(request.batch_size), token_counts)
    return estimator.plan_of(found[0], "terapipe") if found else None


def _uniform(
    estimator: Estimator, batches: Iterable[tuple[int, ...]], token_counts: Iterable[int]
) -> list[Slicing]:
    """Returns the allowed slicings of each of these batches into each of these numbers of equal
    token slices, the fastest first, by the formula for `terapipe`.
    """
    (forward, backward), factors = estimator.times, estimator.stage_factors
    slowest = max(factors)
    wait = sum(factors) - slowest
    batches, found, most = list(batches), [], most_slices(estimator.request.num_stages)
    for num_tokens in token_counts:
        cuts = np.cumsum([0, *uniform_parts(forward.shape[1] - 1, num_tokens)])
        f, b = (t[:, cuts[1:], cuts[:-1]] for t in (forward, backward))  # [sizes, token slices]
        work, longest_f, longest_b = (f + b).sum(1), f.max(1), b.max(1)
        for sizes in batches:
            if max(sizes) > len(f):
                continue
            rows = np.array(sizes) - 1
            longest = longest_f[rows].max() + longest_b[rows].max()
            if np.isfinite(longest) and len(sizes) * num_tokens <= most:
                seconds = float(slowest * work[rows].sum() + wait * longest)
                found.append(Slicing(sizes, (tuple(cuts.tolist()),) * len(sizes), seconds, 0.0, 0))
    return sorted(found, key=lambda slicing: slicing.seconds)
