"""The timeline that follows from a schedule."""

import itertools
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_schedule import plans
from tpipe_jax.plans import Plan
from tpipe_jax.schedule import IDLE, Schedule, make_schedule, terapipe
from tpipe_jax.simulate import simulate

seconds = st.floats(0.01, 10)


@given(st.integers(1, 6), st.lists(st.tuples(seconds, seconds), min_size=1, max_size=8))
def test_makespan_is_that_of_equation_5(num_stages: int, times: list[tuple[float, float]]):
    """All forward, then all backward: sum(f + b) + (P - 1)(max f + max b)."""
    forward, backward = [f for f, _ in times], [b for _, b in times]
    schedule = terapipe(Plan(num_stages, (1,), ((1,) * len(times),)))
    timeline = simulate(schedule, forward, backward)
    boxes = timeline.boxes
    assert len(boxes) == 2 * num_stages * len(times)
    wait = (num_stages - 1) * (max(forward) + max(backward))
    assert timeline.step_seconds == max(box.stop_seconds for box in boxes)
    assert timeline.step_seconds == pytest.approx(sum(forward) + sum(backward) + wait)
    for stage in range(num_stages):  # one thing at a time
        own = sorted((b.start_seconds, b.stop_seconds) for b in boxes if b.stage == stage)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(own))


@given(
    st.integers(1, 6),
    st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=8),
)
def test_a_transfer_holds_a_stage(num_stages: int, times: list[tuple[float, float, float]]):
    """It counts as work does in equation 5, but the stage does not work meanwhile."""
    forward, backward, transfer = (list(column) for column in zip(*times, strict=True))
    schedule = terapipe(Plan(num_stages, (1,), ((1,) * len(times),)))
    timeline = simulate(schedule, forward, backward, transfer_seconds=transfer)
    held_f, held_b = (
        [t + x for t, x in zip(ts, transfer, strict=True)] for ts in (forward, backward)
    )
    wait = (num_stages - 1) * (max(held_f) + max(held_b))
    assert timeline.step_seconds == pytest.approx(sum(held_f) + sum(held_b) + wait)
    work = sum(forward) + sum(backward)
    assert timeline.bubble == pytest.approx(1 - work / timeline.step_seconds)
    for box in timeline.boxes:
        own = (backward if box.is_backward else forward)[box.item]
        assert box.stop_seconds - box.start_seconds == pytest.approx(own)


@given(
    st.lists(st.floats(0.1, 1), min_size=1, max_size=5),
    st.lists(st.tuples(seconds, seconds), min_size=1, max_size=6),
)
def test_makespan_of_unequal_stages_is_the_longest_path(
    factors: list[float], times: list[tuple[float, float]]
):
    """Of all ways through the grid of items and stages, forward and then backward."""
    S, P = len(times), len(factors)
    schedule = terapipe(Plan(P, (1,), ((1,) * S,)))
    timeline = simulate(schedule, *map(list, zip(*times, strict=True)), stage_factors=factors)

    def longest(own: list[float], stages: list[float]) -> float:
        return max(
            sum(own[i] * a for s, a in enumerate(stages) for i in range(stops[s], stops[s + 1] + 1))
            for stops in (
                (0, *inner, S - 1)
                for inner in itertools.combinations_with_replacement(range(S), P - 1)
            )
        )

    forward, backward = ([t[d] for t in times] for d in (0, 1))
    expected = longest(forward, factors) + longest(backward[::-1], factors[::-1])
    assert timeline.step_seconds == pytest.approx(expected)


def longest_path(schedule: Schedule, forward: list[float], backward: list[float]) -> float:
    """When the last stage is done, by the rules that a stage goes on once the one before it is
    done with the same direction of the tick, and all once all are where a part needs them.
    """
    P = schedule.num_stages
    turns = {part.turns for part in schedule.parts}
    between = {tick for part in schedule.parts for tick in (part.enters, part.leaves + 1)}

    @cache
    def done(tick: int, is_backward: bool, stage: int) -> float:
        """With its own work in a direction of a tick."""
        if tick < 0:
            return 0.0
        table, times = (schedule.backward, backward) if is_backward else (schedule.forward, forward)
        before = (tick, False) if is_backward else (tick - 1, True)
        waits_for = range(P) if tick in (turns if is_backward else between) else [stage]
        start = max(handed(*before, s) for s in waits_for)
        item = table[tick, stage]
        return start + (times[item] if item != IDLE else 0.0)

    def handed(tick: int, is_backward: bool, stage: int) -> float:
        """And with what its neighbour hands on, if any stage has work."""
        if tick < 0:
            return 0.0
        giver = stage + 1 if is_backward else stage - 1
        table = schedule.backward if is_backward else schedule.forward
        is_idle = (table[tick] == IDLE).all() or not 0 <= giver < P
        return max(done(tick, is_backward, s) for s in ([stage] if is_idle else [stage, giver]))

    return max(handed(schedule.num_ticks - 1, True, s) for s in range(P))


@given(plans, st.data())
def test_makespan_is_the_longest_path_through_the_table(plan: Plan, data: st.DataObject):
    schedule = make_schedule(plan)
    count = len(schedule.items)
    forward, backward = (
        data.draw(st.lists(seconds, min_size=count, max_size=count)) for _ in range(2)
    )
    timeline = simulate(schedule, forward, backward)
    assert timeline.step_seconds == pytest.approx(longest_path(schedule, forward, backward))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), seconds, seconds)
def test_equal_slices_take_as_long_under_both_schedules(
    num_stages: int, num_sequences: int, num_slices: int, forward: float, backward: float
):
    """(S + P - 1)(f + b)."""
    slices = (1,) * num_sequences, ((1,) * num_slices,) * num_sequences
    count = num_sequences * num_slices
    for name in ("terapipe", "1f1b"):
        schedule = make_schedule(Plan(num_stages, *slices, schedule=name))
        timeline = simulate(schedule, [forward] * count, [backward] * count)
        expected = (count + num_stages - 1) * (forward + backward)
        assert timeline.step_seconds == pytest.approx(expected)
