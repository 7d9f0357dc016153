"""Plans from times: the prediction, the plans it is compared with, the memory, and refusals.

Under TeraPipe's schedule; others are in `test_plan_schedules.py`.
"""

import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from support.latencies import profile
from tpipe_jax.errors import UserError
from tpipe_jax.planning.estimator import predicted_timeline
from tpipe_jax.planning.latency import LatencyTable
from tpipe_jax.planning.plan import Plan, PlanRequest, load_plan
from tpipe_jax.planning.planner import GIB, find_plan
from tpipe_jax.planning.settings import uniform

UNIT, NUM_UNITS, BATCH = 4, 8, 3


def table(floor: float = 3.0) -> LatencyTable:
    """Times that grow with the context and have a floor."""
    b = np.arange(1, BATCH + 1)[:, None, None]
    i, j = np.arange(1, NUM_UNITS + 1)[:, None], np.arange(NUM_UNITS)[None, :]
    forward = np.where(i + j <= NUM_UNITS, np.maximum(b * i * (1 + 0.1 * j), floor), np.inf)
    return LatencyTable(UNIT, forward, 2.5 * forward)


terapipe_request = partial(PlanRequest, schedule="terapipe")


def request(num_stages: int, **changes) -> PlanRequest:
    return terapipe_request(num_stages, BATCH, UNIT * NUM_UNITS, **changes)


def formula(table: LatencyTable, plan: Plan) -> float:
    """Equation 5 for each direction, from the file's own indices."""
    forward, backward = [], []
    for b, slices in zip(plan.batch_slices, plan.token_slices, strict=True):
        context = 0
        for num_tokens in slices:
            index = b - 1, num_tokens // UNIT - 1, context // UNIT
            forward.append(table.forward[index])
            backward.append(table.backward[index])
            context += num_tokens
    wait = (plan.num_stages - 1) * (max(forward) + max(backward))
    return sum(forward) + sum(backward) + wait


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_prediction_is_that_of_the_slices(num_stages: int):
    planning = find_plan(table(), request(num_stages), [1.0] * num_stages)
    plan, prediction = planning.plan, planning.plan.prediction
    assert prediction is not None
    assert prediction.step_seconds == pytest.approx(formula(table(), plan))
    assert prediction.is_optimal
    assert prediction.lower_bound_seconds == pytest.approx(prediction.step_seconds)
    assert prediction.outside_seconds == 0
    assert (plan.num_stages, plan.batch_size, plan.seq_len) == (num_stages, BATCH, 32)
    sizes = [len(slices) for slices in plan.token_slices]
    for times in (
        prediction.slice_forward_seconds,
        prediction.slice_backward_seconds,
        prediction.slice_transfer_seconds,
    ):
        assert [len(t) for t in times] == sizes
    timeline = predicted_timeline(plan, [1.0] * num_stages)
    assert timeline.step_seconds == pytest.approx(prediction.step_seconds)


def test_unsliced_and_uniform_plans_are_the_best_of_their_kind():
    num_stages = 3

    def seconds(num_batch: int, num_tokens: int) -> float:
        batch_slices = uniform(BATCH, num_batch)
        tokens = tuple(UNIT * n for n in uniform(NUM_UNITS, num_tokens))
        return formula(table(), Plan(num_stages, batch_slices, (tokens,) * num_batch))

    planning = find_plan(table(), request(num_stages), [1.0] * num_stages)
    whole = [seconds(m, 1) for m in range(1, BATCH + 1)]
    assert planning.unsliced is not None
    assert planning.unsliced.step_seconds == pytest.approx(min(whole))
    assert planning.unsliced.batch_slices == 1 + int(np.argmin(whole))
    assert planning.unsliced.token_slices == 1
    best = planning.best_uniform
    assert best is not None
    assert best.step_seconds == pytest.approx(seconds(best.batch_slices, best.token_slices))
    options = itertools.product(range(1, BATCH + 1), range(1, NUM_UNITS + 1))
    assert best.step_seconds == pytest.approx(min(itertools.starmap(seconds, options)))
    assert planning.plan.prediction is not None
    assert planning.plan.prediction.step_seconds <= best.step_seconds


def test_given_slices_are_kept():
    plan = find_plan(table(), request(2, batch_slices=(1, 2)), [1.0] * 2).plan
    assert plan.batch_slices == (1, 2)
    measured = profile().table(32)
    for slices in ((100, 28), (128,), (1, 2, 125)):
        asked = terapipe_request(2, 4, 128, token_slices=slices)
        plan = find_plan(measured, asked, [1.0] * 2).plan
        assert set(plan.token_slices) == {slices}
        assert plan.prediction is not None
        cuts = list(itertools.accumulate((0, *slices)))
        b = plan.batch_slices[0]
        for n, num_tokens in enumerate(slices):
            expected = profile().slice_seconds(b, num_tokens, cuts[n])
            assert plan.prediction.slice_forward_seconds[0][n] == pytest.approx(expected[0])
            assert plan.prediction.slice_backward_seconds[0][n] == pytest.approx(expected[1])


def test_what_is_outside_of_the_stages_counts():
    """For the batch that it was measured with: of another it says nothing."""
    measured = profile().table(32)
    plan = find_plan(measured, terapipe_request(2, 4, 128), [1.0] * 2).plan
    assert plan.prediction is not None
    assert plan.prediction.outside_seconds == 7
    inside = predicted_timeline(plan, [1.0] * 2).step_seconds
    assert plan.prediction.step_seconds == pytest.approx(inside + 7)
    assert plan.prediction.lower_bound_seconds == pytest.approx(inside + 7)
    transfer = plan.prediction.slice_transfer_seconds[0][0]
    assert transfer == 0.5 + 0.25 * plan.batch_slices[0] * plan.token_slices[0][0]
    other = find_plan(measured, terapipe_request(2, 3, 128), [1.0] * 2).plan
    assert other.prediction is not None
    assert other.prediction.outside_seconds == 0


def test_stages_of_unequal_speed_are_simulated():
    factors = [1.0, 1.0, 0.5]
    plan = find_plan(table(), request(3), factors).plan
    assert plan.prediction is not None
    makespan = predicted_timeline(plan, factors).step_seconds
    assert plan.prediction.step_seconds == pytest.approx(makespan)
    assert plan.prediction.lower_bound_seconds <= makespan
    alike = find_plan(table(), request(3), [1.0] * 3).plan.prediction
    assert alike is not None
    assert plan.prediction.step_seconds < alike.step_seconds


@pytest.mark.parametrize(
    "factors", [[2.0, 1.95, 1.9], [1.0, 0.5], [1.0, 0.9], [3.0, 1.0, 1.0, 1.0]]
)
def test_no_plan_beats_the_bound_of_unequal_stages(factors: list[float]):
    """With a transfer, too: whatever holds a stage takes its factor."""
    measured = profile(transfer=(0.5, 0.01)).table(16)
    asked = terapipe_request(len(factors), 4, 128)
    planning = find_plan(measured, asked, factors)
    prediction = planning.plan.prediction
    assert prediction is not None
    assert prediction.lower_bound_seconds <= prediction.step_seconds
    for num_batch, num_tokens in itertools.product(range(1, 5), range(1, 9)):
        sizes = uniform(4, num_batch)
        tokens = tuple(16 * n for n in uniform(8, num_tokens))
        given = terapipe_request(len(factors), 4, 128, sizes, tokens)
        other = find_plan(measured, given, factors).plan.prediction
        assert other is not None
        assert other.step_seconds >= prediction.lower_bound_seconds
    for alternative in (planning.unsliced, planning.best_uniform):
        assert alternative is not None
        assert alternative.step_seconds >= prediction.step_seconds


def test_a_plainer_plan_is_taken_where_it_is_faster():
    """With unequal stages the formula that the slicer minimises is a bound: here its plan takes 30
    seconds, and uniform slices, whose bound is higher, 28.
    """
    i, j = np.ogrid[1:5, 0:4]
    times = np.random.default_rng(43).integers(1, 9, (2, 4, 4))
    times = np.where(i + j <= 4, times, np.inf)
    planning = find_plan(LatencyTable(4, times, times), terapipe_request(2, 2, 16), [1.0, 2.0])
    assert planning.best_uniform is not None
    assert planning.best_uniform.step_seconds == 28
    prediction = planning.plan.prediction
    assert prediction is not None
    assert prediction.step_seconds == 28
    assert prediction.lower_bound_seconds <= 28
    assert len(planning.plan.batch_slices) == planning.best_uniform.batch_slices


def test_plans_keep_to_the_memory():
    """1000 bytes, 10 for each of 4 x 128 tokens, and 100 for each token of the longest slice."""
    measured, asked = profile().table(8), terapipe_request(2, 4, 128)
    free = find_plan(measured, asked, [1.0] * 2).plan
    longest = max(b * n for b, n in free.shapes)
    limit = 1000 + 10 * 4 * 128 + 100 * (longest - 8)
    tight = find_plan(measured, asked, [1.0] * 2, memory_limit_bytes=limit).plan
    assert max(b * n for b, n in tight.shapes) <= longest - 8
    assert tight.prediction is not None
    assert free.prediction is not None
    assert tight.prediction.step_seconds > free.prediction.step_seconds
    same = find_plan(measured, asked, [1.0] * 2, memory_limit_bytes=limit + 800).plan
    assert same == free


def test_a_memory_that_is_too_small_says_by_how_much():
    least = 1000 + 10 * 4 * 128 + 100 * 8
    measured, asked = profile().table(8), terapipe_request(2, 4, 128)
    find_plan(measured, asked, [1.0] * 2, memory_limit_bytes=least)
    with pytest.raises(UserError) as error:
        find_plan(measured, asked, [1.0] * 2, memory_limit_bytes=least - 0.25 * GIB)
    assert "is 0.25 GiB too little for any plan" in str(error.value)
    assert "fewer sequences" in str(error.value)


@pytest.mark.parametrize(
    ("given", "longest"), [({"batch_slices": (4,)}, 4 * 8), ({"token_slices": (100, 28)}, 100)]
)
def test_given_slices_may_need_more_memory(given: dict, longest: int):
    measured, asked = profile().table(8), terapipe_request(2, 4, 128, **given)
    least = 1000 + 10 * 4 * 128 + 100 * longest
    find_plan(measured, asked, [1.0] * 2, memory_limit_bytes=least)
    with pytest.raises(UserError, match=r"is 0\.125 GiB too little for any plan"):
        find_plan(measured, asked, [1.0] * 2, memory_limit_bytes=least - 0.125 * GIB)


def test_a_memory_limit_needs_to_know_the_memory():
    with pytest.raises(UserError, match="come without the memory"):
        find_plan(table(), request(2), [1.0] * 2, memory_limit_bytes=1.0)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(UserError, match=r"30 tokens is not a multiple of the unit .* 4 tokens"):
        find_plan(table(), terapipe_request(2, BATCH, 30), [1.0] * 2)
    with pytest.raises(UserError, match="no allowed slices cover 3 sequences of 64 tokens"):
        find_plan(table(), terapipe_request(2, BATCH, 64), [1.0] * 2)
    none = LatencyTable(4, np.full((1, 8, 8), np.inf), np.full((1, 8, 8), np.inf))
    with pytest.raises(UserError, match="no allowed slices cover"):
        find_plan(none, request(2), [1.0] * 2)


def test_a_batch_may_be_larger_than_any_batch_slice():
    plan = find_plan(table(), terapipe_request(2, 7, 32), [1.0] * 2).plan
    assert plan.batch_size == 7
    assert max(plan.batch_slices) <= BATCH


def test_plan_file_gives_back_the_plan(tmp_path: Path):
    plan = find_plan(profile().table(8), terapipe_request(2, 4, 128), [1.0] * 2).plan
    path = tmp_path / "plan.json"
    plan.save(path)
    assert load_plan(path, terapipe_request(2, 4, 128)) == plan
    # Other tools need not know of what is ours.
    content = json.loads(path.read_text())
    for ours in ("outside_seconds", "slice_transfer_seconds"):
        content.pop(ours)
    path.write_text(json.dumps(content))
    loaded = load_plan(path, terapipe_request(2, 4, 128))
    assert loaded.prediction is not None
    assert loaded.prediction.outside_seconds == 0
    assert loaded.prediction.slice_transfer_seconds[0][0] == 0
    assert loaded.token_slices == plan.token_slices
    for value in (-1.0, float("nan"), 10**400, "1", True):
        path.write_text(json.dumps(content | {"predicted_step_seconds": value}))
        with pytest.raises(UserError, match="its predicted times are no times"):
            load_plan(path, terapipe_request(2, 4, 128))
