"""The table of the schedule, and the timeline that follows from it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpipe_jax.plans import Plan
from tpipe_jax.schedule import IDLE, Item, simulate, terapipe

plans = st.builds(
    lambda num_stages, parts: Plan(
        num_stages, tuple(b for b, _ in parts), tuple(t for _, t in parts)
    ),
    st.integers(1, 6),
    st.lists(
        st.tuples(
            st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)
        ),
        min_size=1,
        max_size=3,
    ),
)


def test_grid_of_three_stages_and_four_items():
    schedule = terapipe(Plan(3, (1,), ((4, 3, 2, 1),)))
    x = IDLE
    assert schedule.forward.tolist() == [
        [0, x, x],
        [1, 0, x],
        [2, 1, 0],
        [3, 2, 1],
        [x, 3, 2],
        [x, x, 3],
    ]
    assert schedule.backward.tolist() == [
        [x, x, 3],
        [x, 3, 2],
        [3, 2, 1],
        [2, 1, 0],
        [1, 0, x],
        [0, x, x],
    ]


def test_items_lie_where_the_slices_before_them_end():
    schedule = terapipe(Plan(2, (2, 1), ((5, 3), (6, 1, 1))))
    assert schedule.items == (
        Item(row=0, token=0, num_rows=2, num_tokens=5),
        Item(row=2, token=0, num_rows=1, num_tokens=6),
        Item(row=0, token=5, num_rows=2, num_tokens=3),
        Item(row=2, token=6, num_rows=1, num_tokens=1),
        Item(row=2, token=7, num_rows=1, num_tokens=1),
    )


@given(plans)
def test_every_stage_has_every_item_in_order_one_tick_after_its_neighbour(plan: Plan):
    schedule = terapipe(plan)
    num_items = sum(map(len, plan.token_slices))
    for table, order, first in (
        (schedule.forward, 1, 0),
        (schedule.backward, -1, plan.num_stages - 1),
    ):
        assert table.shape == (num_items + plan.num_stages - 1, plan.num_stages)
        for stage in range(plan.num_stages):
            done = table[:, stage][table[:, stage] != IDLE]
            assert done.tolist() == list(range(num_items))[::order]
            ticks = [int(np.flatnonzero(table[:, stage] == i)[0]) for i in range(num_items)]
            if stage != first:
                neighbour = table[:, stage - order]
                assert [t - 1 for t in ticks] == [
                    int(np.flatnonzero(neighbour == i)[0]) for i in range(num_items)
                ]


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
