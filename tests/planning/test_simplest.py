"""Of plans that are as fast as far as the latencies can tell, the simplest to run is taken."""

import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from support.latencies import profile
from tpipe_jax.planning import planner
from tpipe_jax.planning.latency import LatencyTable, Memory, Profile, Sample
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.planner import TIMED_ERROR, error_of, find_plan
from tpipe_jax.planning.schedule_search import NEAR, complexity, step_seconds
from tpipe_jax.planning.settings import uniform

SEQ_LEN, UNIT = 512, 16
LENGTHS = 16, 48, 144, 272, 512


def slice_seconds(b: int, i: int, j: int) -> float:
    """A constant, and a part for each token that grows with its context."""
    return 2e-3 + 1e-4 * b * i + 2e-7 * b * i * (j + i / 2)


def measured(noise: float = 0.0, seed: int = 0) -> Profile:
    """A profile with noise in its times."""
    random = np.random.default_rng(seed)

    def sample(b: int, i: int, j: int, is_test: bool = False) -> Sample:
        forward, backward = slice_seconds(b, i, j) * random.uniform(1 - noise, 1 + noise, 2)
        return Sample(b, i, j, forward, 2 * backward, is_test)

    fitted = [
        sample(1, i, j) for i in LENGTHS for j in sorted({0, (SEQ_LEN - i) // 2, SEQ_LEN - i})
    ]
    tests = [sample(1, 96, j, True) for j in (0, 96, 288)]
    return profile(
        batch_size=1,
        seq_len=SEQ_LEN,
        key_block=1,
        samples=(*fitted, *tests),
        transfer=(1e-5, 0.0),
        outside_seconds=0.005,
        memory=Memory(0, 1, 0),
    )


def request(num_stages: int = 4, **changes) -> PlanRequest:
    return replace(PlanRequest(num_stages, 1, SEQ_LEN, num_layers=4), **changes)


def uniform_plans(table: LatencyTable, asked: PlanRequest) -> list[Plan]:
    """The plans of equal slices under terapipe, each planned on its own."""
    units = SEQ_LEN // UNIT
    return [
        find_plan(
            table,
            replace(
                asked,
                schedule="terapipe",
                token_slices=tuple(UNIT * length for length in uniform(units, n)),
            ),
            [1.0] * asked.num_stages,
        ).plan
        for n in range(1, units + 1)
    ]


def test_the_simplest_of_the_uniform_plans_is_taken():
    """If a uniform plan is as fast as the fastest within the error of the model."""
    table = measured().table(UNIT)
    planning = find_plan(table, request(schedule="terapipe"), [1.0] * 4)
    assert planning.tolerance == NEAR
    uniform_ = uniform_plans(table, request())
    best = min(map(step_seconds, uniform_))
    assert step_seconds(planning.fastest_uniform) == pytest.approx(best)
    assert best <= (1 + planning.tolerance) * step_seconds(planning.fastest)
    as_fast = [plan for plan in uniform_ if step_seconds(plan) <= (1 + TIMED_ERROR) * best]
    assert len(as_fast) > 2
    assert complexity(planning.plan) == min(map(complexity, as_fast))
    assert complexity(planning.plan) < complexity(planning.fastest)
    assert step_seconds(planning.plan) <= (1 + TIMED_ERROR) * best


def test_the_fastest_plan_is_taken_where_no_uniform_plan_comes_near(
    monkeypatch: pytest.MonkeyPatch,
):
    """Where all work is attention, and each slice has a constant, slices should get shorter."""
    monkeypatch.setattr(
        sys.modules[__name__],
        "slice_seconds",
        lambda b, i, j: 5e-3 + 1e-6 * b * i * (j + i / 2),
    )
    table = measured().table(UNIT)
    planning = find_plan(table, request(schedule="terapipe"), [1.0] * 4)
    best = min(map(step_seconds, uniform_plans(table, request())))
    assert best > (1 + NEAR) * step_seconds(planning.fastest)
    assert planning.plan == planning.fastest


def test_the_fastest_plan_is_taken_where_its_time_is_known_better(monkeypatch: pytest.MonkeyPatch):
    """A uniform plan that is slower than that by more than the error is not taken."""
    table = measured().table(UNIT)
    planning = find_plan(table, request(schedule="terapipe"), [1.0] * 4)
    slower = step_seconds(planning.fastest_uniform) / step_seconds(planning.fastest) - 1
    assert slower > 1e-3
    monkeypatch.setattr(planner, "error_of", lambda plan, profile: slower / 2)
    monkeypatch.setattr(planner, "TIMED_ERROR", slower / 2)
    better = find_plan(table, request(schedule="terapipe"), [1.0] * 4)
    assert better.plan == better.fastest == planning.fastest


def test_times_from_elsewhere_count_as_exact():
    known = measured().table(UNIT)
    planning = find_plan(replace(known, profile=None), request(schedule="terapipe"), [1.0] * 4)
    assert planning.tolerance == 0
    assert planning.plan == planning.fastest
    assert planning.plan.prediction is not None
    assert planning.plan.prediction.is_optimal
    other = find_plan(known, request(schedule="terapipe"), [1.0] * 4).plan
    assert complexity(other) < complexity(planning.plan)


def test_the_error_is_less_where_all_slices_were_timed():
    untimed, timed = (Plan(4, (1,), (slices,)) for slices in ((256,) * 2, (272, 144, 48, 48)))
    assert error_of(untimed, measured()) == NEAR
    assert error_of(timed, measured()) == TIMED_ERROR
    table = measured().table(UNIT)
    of_timed = find_plan(table, request(schedule="terapipe", token_slices=(272, 240)), [1.0] * 4)
    assert of_timed.tolerance == NEAR


def test_the_usual_schedule_comes_before_the_simplest_slices():
    """Among plans that are as fast; where another schedule is faster than that, it is taken."""
    table = measured().table(UNIT)
    planning = find_plan(table, request(), [1.0] * 4)
    seconds = {o.plan.schedule: step_seconds(o.plan) for o in planning.options}
    assert step_seconds(planning.fastest) == min(seconds.values())
    assert planning.plan.schedule == "terapipe"
    assert seconds["terapipe"] < (1 + TIMED_ERROR) * min(seconds.values())
    slow = replace(table, profile=replace(measured(), stage_seconds=(0.0, 0.0)))
    two = find_plan(slow, request(num_stages=8, num_layers=16), [1.0] * 8)
    seconds = {o.plan.schedule: step_seconds(o.plan) for o in two.options}
    assert seconds["terapipe"] > (1 + NEAR) * seconds["interleaved"]
    assert two.plan.schedule == "interleaved"


def test_noise_does_not_change_the_plan():
    """Of ten measurements with errors of 3% either way, nearly all give one plan."""
    found = [
        find_plan(measured(0.03, seed).table(UNIT), request(), [1.0] * 4) for seed in range(10)
    ]
    chosen = Counter((p.plan.schedule, p.plan.batch_slices, p.plan.token_slices) for p in found)
    fastest = Counter((p.fastest.schedule, p.fastest.token_slices) for p in found)
    assert chosen.most_common(1)[0][1] >= 8
    assert fastest.most_common(1)[0][1] < 8


def test_given_slices_are_kept():
    table = measured().table(UNIT)
    for changes in ({"token_slices": (320, 192)}, {"batch_slices": (1,)}):
        plan = find_plan(table, request(**changes), [1.0] * 4).plan
        wanted = changes.get("token_slices")
        assert wanted is None or plan.token_slices == (wanted,)


def test_plainer_plans_fit_in_memory_too():
    """Fewer slices are larger, and need more memory to work on."""
    profile_ = replace(measured(), memory=Memory(1000, 1, 10))
    free = find_plan(profile_.table(UNIT), request(schedule="terapipe"), [1.0] * 4)
    longest = max(n for _, n in free.plan.shapes)
    limit = 1000 + SEQ_LEN + 10 * (longest - UNIT)
    tight = find_plan(profile_.table(UNIT), request(schedule="terapipe"), [1.0] * 4, limit)
    assert max(n for _, n in tight.plan.shapes) < longest
    assert step_seconds(tight.plan) <= (1 + NEAR) * step_seconds(tight.fastest)
