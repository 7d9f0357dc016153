"""Plans under several schedules, and which one is taken."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from support.latencies import profile
from tpipe_jax.config.settings import ScheduleName
from tpipe_jax.errors import UserError
from tpipe_jax.planning import schedule_search
from tpipe_jax.planning.estimator import predicted_timeline
from tpipe_jax.planning.latency import Deferral, LatencyTable, Memory
from tpipe_jax.planning.plan import Plan, PlanRequest, read_plan
from tpipe_jax.planning.planner import GIB, Planning, find_plan
from tpipe_jax.planning.schedule import make_schedule, slice_order
from tpipe_jax.planning.settings import uniform
from tpipe_jax.planning.simulate import simulate


def plan(request: PlanRequest, limit: float | None = None) -> Planning:
    return find_plan(profile().table(8), request, [1.0] * request.num_stages, limit)


def seconds(planned: Plan) -> float:
    assert planned.prediction is not None
    return planned.prediction.step_seconds


def makespan(table: LatencyTable, planned: Plan) -> float:
    """From the file's own indices."""
    schedule, num_chunks = make_schedule(planned), planned.num_chunks
    arrays = [table.forward, table.backward]
    if planned.schedule == "1f1b-deferred":
        assert table.deferred is not None
        arrays[1:] = table.deferred
    times = []
    for own in arrays:
        times.append([])
        for m, n in slice_order(schedule, planned):
            tokens = planned.token_slices[m]
            context = sum(tokens[:n]) // table.unit_tokens
            units = tokens[n] // table.unit_tokens
            times[-1].append(float(own[planned.batch_slices[m] - 1, units - 1, context]))
    return simulate(
        schedule,
        *times[:2],
        weight_seconds=times[2] if len(times) > 2 else None,
        chunk_factors=[1 / num_chunks] * (planned.num_stages * num_chunks),
    ).step_seconds


DEFERRAL = Deferral(weights=(0.5, 0.25), saved=(0.25, 0.125))


@pytest.mark.parametrize(
    ("schedule", "num_stages"),
    [
        ("1f1b", 1),
        *[(name, P) for name in ("1f1b", "interleaved", "1f1b-deferred") for P in (2, 5)],
    ],
)
def test_a_schedule_is_planned_with_its_own_makespan(num_stages: int, schedule: ScheduleName):
    """And found is no worse than any plan of equal slices."""
    table = replace(profile(deferral=DEFERRAL).table(16), profile=None)
    num_chunks = 3 if schedule == "interleaved" else None
    request = PlanRequest(num_stages, 4, 128, schedule=schedule, num_chunks=num_chunks)
    planning = find_plan(table, request, [1.0] * num_stages)
    assert planning.plan.schedule == schedule
    assert planning.plan.num_chunks == (num_chunks or 1)
    assert read_plan(json.loads(json.dumps(planning.plan.to_dict()))) == planning.plan
    assert seconds(planning.plan) == pytest.approx(makespan(table, planning.plan))
    assert planning.plan.prediction is not None
    assert planning.plan.prediction.lower_bound_seconds <= seconds(planning.plan) * (1 + 1e-9)
    for num_batch, num_tokens in itertools.product((2, 4), range(1, 9)):
        tokens = tuple(16 * n for n in uniform(8, num_tokens))
        sizes = uniform(4, num_batch)
        slices = sizes, (tokens,) * num_batch
        other = Plan(num_stages, *slices, schedule=schedule, num_chunks=num_chunks or 1)
        assert seconds(planning.plan) <= makespan(table, other) * (1 + 1e-9)
        assert planning.plan.prediction.lower_bound_seconds <= makespan(table, other) * (1 + 1e-9)


def test_moved_cuts_make_1f1b_faster(monkeypatch: pytest.MonkeyPatch):
    """Where the context costs as much as the tokens, slices that are best for terapipe are not."""
    i, j = np.ogrid[1:9, 0:8]
    times = np.where(i + j <= 8, i * (1.0 + 2 * j + i), np.inf)[None]
    table, request = LatencyTable(4, times, 2.5 * times), PlanRequest(5, 3, 32, schedule="1f1b")
    moved = find_plan(table, request, [1.0] * 5).plan
    monkeypatch.setattr(schedule_search, "MOST_MOVES", 0)
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
    in_shared_rows = make_schedule(planned)
    kept = 7 * in_shared_rows.num_rows * 128 + 3 * in_shared_rows.num_gradient_rows * 128
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


def test_deferred_gradients_of_weights_are_timed_and_kept():
    """Backward passes are shorter by what is saved, and what comes later takes what it takes."""
    table = profile(deferral=DEFERRAL).table(8)
    assert table.deferred is not None
    inputs, weights = table.deferred
    assert weights[1, 2, 0] == 0.5 + 0.25 * 2 * 24
    assert inputs[1, 2, 3] == pytest.approx(table.backward[1, 2, 3] - 0.25 - 0.125 * 2 * 24)
    request = PlanRequest(2, 8, 128, (1,) * 8, (128,), "1f1b-deferred")
    measured = profile(deferral=DEFERRAL, memory=Memory(1000, 7, 100, 3, 5)).table(8)
    [option] = find_plan(measured, request, [1.0] * 2).options
    schedule = make_schedule(option.plan)
    assert (schedule.num_rows, schedule.num_slots) == (3, 3)
    assert option.activation_bytes == 7 * 3 * 128 + 3 * 128 + 5 * 3 * 128
    assert option.plan.prediction is not None
    assert option.plan.prediction.slice_weight_seconds == ((0.5 + 0.25 * 128,),) * 8


def test_of_all_schedules_the_fastest_is_taken():
    """Two slices of a sequence on four stages: chunks wait a half, or a quarter, as long."""
    table = profile(deferral=DEFERRAL).table(8)
    names = [
        option.plan.schedule
        for option in find_plan(table, PlanRequest(4, 8, 128, num_layers=16), [1.0] * 4).options
    ]
    assert names == ["terapipe", "1f1b", "interleaved", "1f1b-deferred"]
    few = PlanRequest(4, 1, 128, (1,), (64, 64), num_layers=16)
    planning = find_plan(profile(transfer=(0.0, 0.0)).table(8), few, [1.0] * 4)
    assert [option.plan.schedule for option in planning.options] == ["terapipe", "interleaved"]
    assert (planning.plan.schedule, planning.plan.num_chunks) == ("interleaved", 4)
    assert planning.chunk_factors == (0.25,) * 16
    whole, chunks = planning.options
    assert chunks.bubble < whole.bubble
    assert chunks.activation_bytes == whole.activation_bytes
    # A transfer comes with each chunk, and may outweigh what is gained.
    slow = find_plan(profile(transfer=(1e4, 0.0)).table(8), few, [1.0] * 4)
    assert slow.plan.schedule == "terapipe"


def test_chunks_of_unequal_layers():
    """Five layers on two stages: chunks of 2, 1, 1 and 1."""
    request = PlanRequest(2, 2, 128, schedule="interleaved", num_layers=5)
    planning = find_plan(profile().table(8), request, [1.0, 2 / 3])
    assert planning.chunk_factors == pytest.approx((2 / 3, 1 / 3, 1 / 3, 1 / 3))
    inside = predicted_timeline(planning.plan, planning.chunk_factors).step_seconds
    assert seconds(planning.plan) == pytest.approx(inside)  # of another batch than was measured


def test_chunks_of_stages_of_unequal_speed():
    """Each has its share of what its stage takes."""
    request = PlanRequest(2, 2, 128, schedule="interleaved", num_chunks=2, num_layers=4)
    planning = find_plan(profile().table(8), request, [1.0, 2.0])
    assert planning.chunk_factors == pytest.approx((0.5, 1.0, 0.5, 1.0))


def test_of_others_that_take_as_long_the_fastest_is_taken():
    """Two slices of each of 25 sequences: less than 1% between the three, of which terapipe is
    slower by more.
    """
    times = np.full((1, 2, 2), np.inf)
    times[0, 0, :] = 1.0
    inputs, weights = 0.5 * times, 0.48 * times
    table = LatencyTable(64, times, times, deferred=(inputs, weights))
    request = PlanRequest(2, 25, 128, (1,) * 25, num_layers=4)
    planning = find_plan(table, request, [1.0, 1.0])
    by_name = {option.plan.schedule: seconds(option.plan) for option in planning.options}
    fastest = min(by_name, key=lambda name: by_name[name])
    assert fastest == "1f1b-deferred"
    assert by_name["interleaved"] <= 1.01 * by_name[fastest] < by_name["terapipe"]
    assert planning.plan.schedule == fastest


@pytest.mark.parametrize(("num_sequences", "schedule"), [(24, "interleaved"), (25, "terapipe")])
def test_terapipe_may_take_a_little_longer(num_sequences: int, schedule: ScheduleName):
    """S + 1 against S + 1 / 2, for S = 48 and for S = 50."""
    times = np.full((1, 2, 2), np.inf)
    times[0, 0, :] = 1.0
    batch = (1,) * num_sequences
    request = PlanRequest(2, num_sequences, 128, batch, num_layers=4, num_chunks=2)
    planning = find_plan(LatencyTable(64, times, times), request, [1.0, 1.0])
    by_name = {option.plan.schedule: seconds(option.plan) for option in planning.options}
    assert by_name["terapipe"] == 2 * (2 * num_sequences + 1)
    assert by_name["interleaved"] < by_name["terapipe"]
    assert planning.plan.schedule == schedule


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "1f1b-deferred"])
def test_no_plan_is_called_faster_than_it_can_be(schedule: ScheduleName, num_stages: int):
    """With slices that are all alike and given nothing is left to find, and nothing to hide in."""
    times = np.full((1, 1, 1), 3.0)
    table = LatencyTable(64, times, times, deferred=(0.5 * times, 0.5 * times))
    for num_sequences in (2, 3, 9, 20):
        request = PlanRequest(
            num_stages, num_sequences, 64, (1,) * num_sequences, schedule=schedule, num_chunks=2
        )
        planned = find_plan(table, request, [1.0] * num_stages).plan
        assert planned.prediction is not None
        bound = planned.prediction.lower_bound_seconds
        assert bound <= makespan(table, planned) * (1 + 1e-9)
        assert planned.prediction.is_optimal == (bound >= seconds(planned) * (1 - 1e-9))
        if schedule == "1f1b":
            assert planned.prediction.is_optimal


def test_plainer_plans_keep_to_the_memory_too():
    request = PlanRequest(2, 4, 128, schedule="terapipe")
    measured = profile(memory=Memory(1000, 7, 10000, 3), transfer=(5.0, 0.0)).table(8)
    limit = 1000 + 10 * 4 * 128 + 10000 * 32
    planning = find_plan(measured, request, [1.0] * 2, limit)
    assert planning.unsliced is None
    assert planning.best_uniform is not None
    assert planning.best_uniform.token_slices >= 4
    free = find_plan(measured, request, [1.0] * 2)
    assert free.unsliced is not None


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (PlanRequest(2, 8, 128, batch_slices=(8,)), "the latencies are for up to 4 sequences"),
        (PlanRequest(2, 4, 128, token_slices=(100, 28)), "token slices that are given"),
    ],
)
def test_times_that_are_not_there_are_named(request_: PlanRequest, sentence: str):
    table = replace(profile().table(8), profile=None)
    with pytest.raises(UserError, match=sentence):
        find_plan(table, request_, [1.0] * 2)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (PlanRequest(1, 4, 128, schedule="interleaved"), "and there are 1 stages of some layers"),
        (PlanRequest(2, 4, 128, schedule="interleaved", num_layers=3), "2 stages of 3 layers"),
        (PlanRequest(2, 4, 128, schedule="1f1b-deferred"), "without backward_inputs and backward"),
        (PlanRequest(2, 1, 128, schedule="1f1b"), "1f1b needs several batch slices"),
    ],
    ids=str,
)
def test_schedules_that_cannot_be_planned_are_refused(request_: PlanRequest, sentence: str):
    with pytest.raises(UserError, match=sentence):
        plan(request_)


@pytest.mark.parametrize(
    ("num_stages", "batch_size", "few"), [(1, 4, "stages"), (2, 1, "batch slices")]
)
def test_deferral_needs_stages_and_sequences(num_stages: int, batch_size: int, few: str):
    table = profile(deferral=DEFERRAL).table(8)
    request = PlanRequest(num_stages, batch_size, 128, schedule="1f1b-deferred")
    with pytest.raises(UserError, match=f"1f1b-deferred needs several {few}"):
        find_plan(table, request, [1.0] * num_stages)


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
