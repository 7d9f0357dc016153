"""Plans under several schedules, and which one is taken."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from test_latency import profile
from tpipe_jax import planner
from tpipe_jax.config import ScheduleName, UserError
from tpipe_jax.estimate import predicted_timeline
from tpipe_jax.latency import LatencyTable, Memory
from tpipe_jax.plan_settings import uniform
from tpipe_jax.planner import GIB, Planning, find_plan
from tpipe_jax.plans import Plan, PlanRequest
from tpipe_jax.schedule import make_schedule, slice_order
from tpipe_jax.simulate import simulate


def plan(request: PlanRequest, limit: float | None = None) -> Planning:
    return find_plan(profile().table(8), request, [1.0] * request.num_stages, limit)


def seconds(planned: Plan) -> float:
    assert planned.prediction is not None
    return planned.prediction.step_seconds


def makespan(table: LatencyTable, planned: Plan) -> float:
    """From the file's own indices."""
    schedule = make_schedule(planned)
    times = []
    for own in (table.forward, table.backward):
        times.append([])
        for m, n in slice_order(schedule, planned):
            tokens = planned.token_slices[m]
            context = sum(tokens[:n]) // table.unit_tokens
            units = tokens[n] // table.unit_tokens
            times[-1].append(float(own[planned.batch_slices[m] - 1, units - 1, context]))
    return simulate(schedule, *times).step_seconds


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_1f1b_is_planned_with_its_own_makespan(num_stages: int):
    """And found is no worse than any plan of equal slices."""
    table = replace(profile().table(16), profile=None)
    request = PlanRequest(num_stages, 4, 128, schedule="1f1b")
    planning = find_plan(table, request, [1.0] * num_stages)
    assert planning.plan.schedule == "1f1b"
    assert seconds(planning.plan) == pytest.approx(makespan(table, planning.plan))
    assert planning.plan.prediction is not None
    assert planning.plan.prediction.lower_bound_seconds <= seconds(planning.plan) * (1 + 1e-9)
    for num_batch, num_tokens in itertools.product((2, 4), range(1, 9)):
        tokens = tuple(16 * n for n in uniform(8, num_tokens))
        sizes = uniform(4, num_batch)
        other = Plan(num_stages, sizes, (tokens,) * num_batch, schedule="1f1b")
        assert seconds(planning.plan) <= makespan(table, other) * (1 + 1e-9)
        assert planning.plan.prediction.lower_bound_seconds <= makespan(table, other) * (1 + 1e-9)


def test_moved_cuts_make_1f1b_faster(monkeypatch: pytest.MonkeyPatch):
    """Where the context costs as much as the tokens, slices that are best for terapipe are not."""
    i, j = np.ogrid[1:9, 0:8]
    times = np.where(i + j <= 8, i * (1.0 + 2 * j + i), np.inf)[None]
    table, request = LatencyTable(4, times, 2.5 * times), PlanRequest(5, 3, 32, schedule="1f1b")
    moved = find_plan(table, request, [1.0] * 5).plan
    monkeypatch.setattr(planner, "MOST_MOVES", 0)
    assert seconds(moved) < 0.98 * seconds(find_plan(table, request, [1.0] * 5).plan)
    assert seconds(moved) == pytest.approx(makespan(table, moved))


def test_given_slices_are_kept_under_1f1b():
    for batch, tokens in (((1, 2, 1), None), (None, (100, 28)), ((3, 1), (64, 64))):
        planned = plan(PlanRequest(2, 4, 128, batch, tokens, "1f1b")).plan
        assert batch is None or planned.batch_slices == batch
        assert tokens is None or set(planned.token_slices) == {tokens}


def test_of_schedules_that_take_as_long_stages_that_wait_less_count():
    """Whole sequences, all alike: both schedules take (S + P - 1) (f + b)."""
    request = PlanRequest(2, 8, 128, (1,) * 8, (128,))
    planning = plan(request)
    terapipe, other = planning.options
    assert (terapipe.plan.schedule, other.plan.schedule) == ("terapipe", "1f1b")
    assert seconds(terapipe.plan) == pytest.approx(seconds(other.plan))
    assert terapipe.bubble == pytest.approx(other.bubble)
    assert terapipe.activation_bytes == (7 + 3) * 8 * 128
    assert other.activation_bytes == 7 * 3 * 128 + 3 * 128
    assert planning.plan == terapipe.plan
    alone = plan(replace(request, num_stages=1))
    assert alone.plan.schedule == "1f1b"
    assert [option.activation_bytes for option in alone.options] == [10 * 8 * 128, 10 * 128]


def test_a_faster_schedule_is_taken():
    """One sequence takes longer than two, and is the first to come and the last to go under
    terapipe, which takes 14 + 9 + 2 (6 + 7).
    """
    forward, backward = np.full((2, 5, 1, 1), np.inf)
    forward[:2, 0, 0], backward[:2, 0, 0] = (6, 4), (7, 1)
    request = PlanRequest(3, 5, 128, (1, 2, 2))
    planning = find_plan(LatencyTable(128, forward, backward), request, [1.0] * 3)
    assert [seconds(option.plan) for option in planning.options] == [49, 45]
    assert planning.plan == planning.options[1].plan


@pytest.mark.parametrize("schedule", ["1f1b", None])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("excess", [0, 1, 0.05, 0.3, 0.6])
def test_a_plan_that_fits_is_found(num_stages: int, schedule: ScheduleName | None, excess: float):
    """Where slices are what takes most of the memory, from the limit on that only the shortest keep
    to.
    """
    measured = profile(memory=Memory(1000, 7, 10000, 3), transfer=(5.0, 0.0)).table(8)
    request = PlanRequest(num_stages, 4, 128, schedule=schedule)
    rows = {1: 1, 2: 3, 3: 3}[num_stages]  # of slices of 8 tokens
    least = 1000 + 7 * rows * 128 + 3 * 128 + 10000 * 8
    limit = least + (excess if excess in (0, 1) else excess * least)
    planned = find_plan(measured, request, [1.0] * num_stages, limit).plan
    in_turn = make_schedule(planned)
    kept = 7 * in_turn.num_rows * 128 + 3 * in_turn.num_gradient_rows * 128
    assert 1000 + kept + 10000 * max(b * n for b, n in planned.shapes) <= limit
    with pytest.raises(UserError, match="too little for any plan"):
        find_plan(measured, request, [1.0] * num_stages, least - 1)


def test_a_limit_leaves_the_schedule_that_keeps_less():
    request = PlanRequest(2, 8, 128, (1,) * 8, (128,))
    limit = 1000 + 7 * 3 * 128 + 3 * 128 + 100 * 128
    tight = plan(request, limit)
    assert [option.fits for option in tight.options] == [False, True]
    assert tight.plan.schedule == "1f1b"
    with pytest.raises(UserError, match=r"is 0\.5 GiB too little for any plan"):
        plan(request, limit - GIB / 2)
    free = plan(replace(request, schedule="terapipe"), 10 * limit)
    assert [option.plan.schedule for option in free.options] == ["terapipe"]


@pytest.mark.parametrize(
    ("request_", "schedules"),
    [
        (PlanRequest(2, 1, 128), ["terapipe"]),
        (PlanRequest(2, 4, 128, batch_slices=(4,)), ["terapipe"]),
        (PlanRequest(2, 4, 128, batch_slices=(3, 1)), ["terapipe", "1f1b"]),
        (PlanRequest(2, 4, 128, schedule="1f1b"), ["1f1b"]),
    ],
    ids=["one sequence", "one batch slice", "two batch slices", "as asked"],
)
def test_one_batch_slice_has_one_schedule(request_: PlanRequest, schedules: list[ScheduleName]):
    assert [option.plan.schedule for option in plan(request_).options] == schedules


def test_stages_of_unequal_speed_under_1f1b():
    request = PlanRequest(3, 4, 128, schedule="1f1b")
    factors = [1.0, 1.0, 0.5]
    planned = find_plan(profile().table(8), request, factors).plan
    assert planned.prediction is not None
    inside = predicted_timeline(planned, factors).step_seconds
    assert seconds(planned) == pytest.approx(inside + planned.prediction.outside_seconds)
    assert planned.prediction.lower_bound_seconds <= seconds(planned)


def test_1f1b_of_one_sequence_is_refused():
    with pytest.raises(UserError, match="1f1b needs several batch slices, and there is only one"):
        plan(PlanRequest(2, 1, 128, schedule="1f1b"))
