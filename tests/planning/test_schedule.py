"""The table of the schedule, and the timeline that follows from it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.drawn_plans import plans
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import (
    IDLE,
    Item,
    Part,
    deferred_weights,
    idle_schedule,
    make_schedule,
    one_forward_one_backward,
    slice_order,
    terapipe,
)
from tpipe_jax.planning.schedule_check import check


def test_terapipe_of_three_stages_and_four_items():
    schedule = terapipe(Plan(3, (1,), ((4, 3, 2, 1),)))
    x = IDLE
    forward = [[0, x, x], [1, 0, x], [2, 1, 0], [3, 2, 1], [x, 3, 2], [x, x, 3]]
    backward = [[x, x, 3], [x, 3, 2], [3, 2, 1], [2, 1, 0], [1, 0, x], [0, x, x]]
    idle = [[x, x, x]] * 6
    assert schedule.forward.tolist() == forward + idle
    assert schedule.backward.tolist() == idle + backward
    assert schedule.parts == (
        Part(0, 1, 0, embed_tick=0, loss_tick=5, embed_grad_tick=11, last_tick=11),
    )


def test_1f1b_of_three_stages_and_four_sequences_of_two_slices():
    schedule = one_forward_one_backward(Plan(3, (1,) * 4, ((5, 3),) * 4))
    x = IDLE
    assert schedule.forward.T.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, x, x, x, x, x],
        [x, 0, 1, 2, 3, 4, 5, 6, 7, x, x, x, x],
        [x, x, 0, 1, 2, 3, 4, 5, 6, 7, x, x, x],
    ]
    assert schedule.backward.T.tolist() == [
        [x, x, x, x, x, 1, 0, 3, 2, 5, 4, 7, 6],
        [x, x, x, x, 1, 0, 3, 2, 5, 4, 7, 6, x],
        [x, x, x, 1, 0, 3, 2, 5, 4, 7, 6, x, x],
    ]
    assert [(p.embed_tick, p.loss_tick, p.embed_grad_tick) for p in schedule.parts] == [
        *[(0, 3, 6), (2, 5, 8), (4, 7, 10), (6, 9, 12)]
    ]


def test_1f1b_on_one_stage_has_one_sequence_at_a_time():
    """Accumulation of gradients."""
    schedule = one_forward_one_backward(Plan(1, (1, 1), ((5, 3), (8,))))
    x = IDLE
    assert schedule.forward[:, 0].tolist() == [0, 1, x, 2]
    assert schedule.backward[:, 0].tolist() == [x, 1, 0, 2]
    assert schedule.num_rows == 1


def test_chunks_of_a_stage_follow_each_other():
    """Three slices of two chunks on two stages, of which the first has none to wait for."""
    schedule = make_schedule(Plan(2, (1,), ((4, 3, 2),), schedule="interleaved", num_chunks=2))
    x = IDLE
    assert [(item.token, item.chunk) for item in schedule.items] == [
        *[(0, 0), (4, 0), (7, 0), (0, 1), (4, 1), (7, 1)]
    ]
    assert schedule.forward[:7].T.tolist() == [[0, 1, 2, 3, 4, 5, x], [x, 0, 1, 2, 3, 4, 5]]
    assert schedule.backward[7:].T.tolist() == [[x, 5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0, x]]


def test_a_slice_alone_goes_round():
    schedule = make_schedule(Plan(3, (1,), ((4,),), schedule="interleaved", num_chunks=2))
    x = IDLE
    assert schedule.forward[:6].T.tolist() == [
        [0, x, x, 1, x, x],
        [x, 0, x, x, 1, x],
        [x, x, 0, x, x, 1],
    ]


def test_gradients_of_weights_wait_for_ticks_that_would_idle():
    """The others save up what they leave out while only they have a slice to go forward."""
    schedule = deferred_weights(Plan(3, (1,) * 5, ((8,),) * 5))
    x = IDLE
    assert schedule.backward.T.tolist() == [
        [x, x, x, x, 0, 1, 2, 3, 4],
        [x, x, x, 0, 1, 2, 3, 4, x],
        [x, x, 0, 1, 2, 3, 4, x, x],
    ]
    assert schedule.weights is not None
    columns = schedule.weights.swapaxes(0, 1).tolist()
    assert [[[i for i in row if i != x] for row in own] for own in columns] == [
        [[], [], [], [], [0], [1], [2], [3], [4]],
        [[], [], [], [], [], [0], [1], [2, 3], [4]],
        [[], [], [], [], [], [], [0, 1], [2, 3], [4]],
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
def test_every_table_can_be_followed(plan: Plan):
    schedule = make_schedule(plan)
    check(schedule)
    for item, (m, n) in zip(schedule.items, slice_order(schedule, plan), strict=True):
        assert item.shape == (plan.batch_slices[m], plan.token_slices[m][n])
        assert item.row == sum(plan.batch_slices[:m])
        assert item.token == sum(plan.token_slices[m][:n])
    assert len(set(schedule.items)) == plan.num_chunks * sum(map(len, plan.token_slices))
    assert sum(part.num_rows for part in schedule.parts) == plan.batch_size


@given(plans)
def test_rows_are_as_few_as_the_table_allows(plan: Plan):
    """But for gaps between parts of unequal sizes, and never more than the batch has."""
    schedule = make_schedule(plan)
    most = max(
        sum(part.num_rows for part in schedule.parts if part.embed_tick <= tick <= part.last_tick)
        for tick in range(schedule.num_ticks)
    )
    assert most <= schedule.num_rows <= plan.batch_size
    if len(set(plan.batch_slices)) == 1:
        assert schedule.num_rows == most


def test_parts_of_unequal_sizes_lie_close():
    schedule = one_forward_one_backward(Plan(2, (3, 1, 1, 2, 1), ((4, 4),) * 5))
    assert [part.buffer_row for part in schedule.parts] == [0, 3, 4, 0, 2]
    assert (schedule.num_rows, schedule.num_gradient_rows) == (5, 3)


def test_an_idle_schedule_has_its_parts():
    schedule = one_forward_one_backward(Plan(2, (1, 1), ((4, 4),) * 2))
    resting = idle_schedule(schedule)
    assert resting.parts == schedule.parts
    assert (resting.forward == IDLE).all()
    assert (resting.backward == IDLE).all()
    assert (resting.num_ticks, resting.num_rows) == (schedule.num_ticks, schedule.num_rows)


@given(plans)
def test_few_gradients_of_weights_wait(plan: Plan):
    """Beside those of the tick itself, as many as slices that have gone back to the first stage
    while others came, and to the last one before; there is a slot for each, and no more.
    """
    schedule, most = deferred_weights(plan), 0
    for stage in range(plan.num_stages):
        waiting = 0
        for items, item in zip(
            schedule.weights[:, stage], schedule.backward[:, stage], strict=True
        ):
            waiting += item != IDLE
            most = max(most, waiting)
            waiting -= (items != IDLE).sum()
            assert 0 <= waiting <= 2 * (plan.num_stages - 1)
        assert waiting == 0
    assert schedule.num_slots == most


@given(st.integers(1, 6), st.integers(1, 6))
def test_1f1b_keeps_as_few_sequences_of_many_as_of_some(num_stages: int, num_slices: int):
    """A sequence lives for 2 (slices + P - 1) - 1 ticks, and another follows after its slices."""

    def rows(num_sequences: int) -> int:
        slices = (1,) * num_sequences, ((1,) * num_slices,) * num_sequences
        return make_schedule(Plan(num_stages, *slices, schedule="1f1b")).num_rows

    bound = -(-(2 * (num_slices + num_stages - 1) - 1) // num_slices)
    assert rows(40) == rows(2 * num_stages + 2) == (bound if num_stages > 1 else 1)


def changed(table: np.ndarray, tick: int, stage: int, item: int) -> np.ndarray:
    table = table.copy()
    table[tick, stage] = item
    return table


def swapped(table: np.ndarray, a: int, b: int) -> np.ndarray:
    """With another order of two items on all stages."""
    return np.where(table == a, b, np.where(table == b, a, table))


TABLES = one_forward_one_backward(Plan(3, (1,) * 4, ((5, 3),) * 4))
FIRST, SECOND, *REST = TABLES.parts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"forward": changed(TABLES.forward, 0, 0, 1)}, "stage 0 does not have every item once"),
        ({"backward": changed(TABLES.backward, 6, 0, IDLE)}, "stage 0 does not have every item"),
        ({"forward": np.roll(TABLES.forward, 1, axis=1)}, "one tick after its neighbour"),
        ({"forward": TABLES.backward, "backward": TABLES.forward}, "one tick after its neighbour"),
        ({"forward": swapped(TABLES.forward, 0, 1)}, "item 1 does not follow item 0"),
        ({"backward": swapped(TABLES.backward, 2, 3)}, "item 3 does not follow item 2"),
        ({"backward": swapped(TABLES.backward, 0, 2)}, "item 0 goes backward before the losses"),
        ({"parts": (replace(FIRST, embed_tick=1), SECOND, *REST)}, "item 0 goes forward before"),
        (
            {"parts": (replace(FIRST, loss_tick=2), SECOND, *REST)},
            "item 1 goes forward .* after its losses",
        ),
        ({"parts": (replace(FIRST, loss_tick=4), SECOND, *REST)}, "item 1 goes backward before"),
        (
            {"parts": (replace(FIRST, embed_grad_tick=5), SECOND, *REST)},
            "item 0 goes backward .* after the grad",
        ),
        ({"parts": (FIRST, replace(SECOND, buffer_row=0), *REST)}, "parts 0 and 1 have the same"),
        ({"num_rows": 3}, "part 3 has no rows"),
        ({"num_gradient_rows": 0}, "part 0 has no rows for gradients"),
        ({"parts": (FIRST, replace(SECOND, embed_tick=0), *REST)}, "embed_tick is the same tick"),
        (
            {"parts": (replace(FIRST, embed_grad_tick=8), SECOND, *REST)},
            "embed_grad_tick is the same tick",
        ),
        ({"forward": TABLES.forward[1:]}, "different shapes"),
        (
            {"parts": (replace(FIRST, last_tick=5), SECOND, *REST)},
            "part 0 ends before the gradients",
        ),
    ],
)
def test_tables_that_cannot_be_followed_are_refused(changes: dict[str, Any], reason: str):
    check(TABLES)
    with pytest.raises(ValueError, match=reason):
        check(replace(TABLES, **changes))


def test_gradients_of_two_sequences_at_a_time_need_rows():
    """TeraPipe with a part for each sequence, whose slices alternate."""
    schedule = terapipe(Plan(2, (1, 1), ((5, 3), (5, 3))))
    parts = Part(0, 1, 0, 0, 3, 9, 9), Part(1, 1, 1, 1, 4, 8, 8)
    check(replace(schedule, parts=parts))
    with pytest.raises(ValueError, match="parts 0 and 1 have the same gradients"):
        check(replace(schedule, parts=parts, num_gradient_rows=1))


def test_rows_that_are_needed_to_their_end_are_no_other_part_s():
    schedule = one_forward_one_backward(Plan(2, (1,) * 6, ((8,),) * 6))
    first, second, third, fourth, *rest = schedule.parts
    assert first.buffer_row == fourth.buffer_row
    longer = replace(first, last_tick=fourth.embed_tick)
    with pytest.raises(ValueError, match="parts 0 and 3 have the same rows"):
        check(replace(schedule, parts=(longer, second, third, fourth, *rest)))


def test_a_chunk_that_comes_too_early_is_refused():
    """Where the slice has not gone through the one before it."""
    schedule = make_schedule(Plan(2, (1,), ((4, 4),), schedule="interleaved", num_chunks=2))
    check(schedule)
    items = [replace(item, chunk=1 - item.chunk) for item in schedule.items]
    with pytest.raises(ValueError, match="item 0 enters before item 2 has gone through its chunk"):
        check(replace(schedule, items=tuple(items)))


def test_gradients_of_weights_that_come_too_early_or_late_are_refused():
    schedule = deferred_weights(Plan(2, (1,) * 3, ((4, 4),) * 3))
    check(schedule)
    earlier = np.concatenate([schedule.weights[1:], schedule.weights[:1]])
    with pytest.raises(ValueError, match="taken before their backward pass"):
        check(replace(schedule, weights=earlier))
    with pytest.raises(ValueError, match="stage 0 does not have every item once"):
        check(replace(schedule, weights=np.full_like(schedule.weights, IDLE)))
    with pytest.raises(ValueError, match=r"are in a slot of stage . at a time"):
        check(replace(schedule, slots=np.zeros_like(schedule.slots)))
    *parts, last = schedule.parts
    with pytest.raises(ValueError, match="taken after their part has ended"):
        check(replace(schedule, parts=(*parts, replace(last, last_tick=last.embed_grad_tick - 1))))
