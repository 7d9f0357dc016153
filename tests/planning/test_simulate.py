"""The timeline that follows from a schedule."""

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.drawn_plans import plans
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import IDLE, Schedule, make_schedule, terapipe
from tpipe_jax.planning.simulate import simulate

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
        own = (backward if box.kind == "backward" else forward)[box.item]
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
    timeline = simulate(schedule, *map(list, zip(*times, strict=True)), chunk_factors=factors)

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


PHASES = "forward", "backward", "weights"  # of a tick
Times = dict[str, list[float]]  # of each item, by phase, and of its "transfer"


def longest_path(schedule: Schedule, times: Times, factors: list[float]) -> float:
    """When the last stage is done, by the rules that a stage goes on once the one before it is
    done with the same direction of the tick, and all once all are where a part needs them.
    """
    P, num_chunks = schedule.num_stages, 1 + max(item.chunk for item in schedule.items)
    weights = np.full((schedule.num_ticks, P, 1), IDLE)
    tables = {
        "weights": weights if schedule.weights is None else schedule.weights,
        "forward": schedule.forward[..., None],
        "backward": schedule.backward[..., None],
    }
    meetings = {
        "forward": {part.embed_tick for part in schedule.parts},
        "backward": {part.loss_tick for part in schedule.parts},
        "weights": {part.embed_grad_tick for part in schedule.parts},
    }

    @cache
    def done(tick: int, phase: int, stage: int) -> float:
        """With its own work in a phase of a tick."""
        name = PHASES[phase]
        waits_for = range(P) if tick in meetings[name] else [stage]
        start = max(handed(tick, phase - 1, s) for s in waits_for)
        items = [item for item in tables[name][tick, stage].tolist() if item != IDLE]
        of_chunk = [factors[schedule.items[item].chunk * P + stage] for item in items]
        transfers = [0.0 if name == "weights" else num_chunks * times["transfer"][i] for i in items]
        own = [times[name][i] + x for i, x in zip(items, transfers, strict=True)]
        return start + sum(a * t for a, t in zip(of_chunk, own, strict=True))

    @cache
    def handed(tick: int, phase: int, stage: int) -> float:
        """And with what its neighbour hands on, if any stage has work."""
        if phase < 0:
            return handed(tick - 1, 2, stage) if tick else 0.0
        giver = stage + {"weights": 0, "forward": -1, "backward": 1}[PHASES[phase]]
        if num_chunks > 1:
            giver %= P
        is_idle = (tables[PHASES[phase]][tick] == IDLE).all() or not 0 <= giver < P
        return max(done(tick, phase, s) for s in ([stage] if is_idle else [stage, giver]))

    for tick, phase in itertools.product(range(schedule.num_ticks), range(3)):
        times_of_all = [handed(tick, phase, s) for s in range(P)]  # kept, so that none recurs far
    return max(times_of_all)


@given(plans, st.data())
def test_makespan_is_the_longest_path_through_the_table(plan: Plan, data: st.DataObject):
    schedule = make_schedule(plan)
    count = len(schedule.items)
    times = {
        name: data.draw(st.lists(seconds, min_size=count, max_size=count))
        for name in (*PHASES, "transfer")
    }
    num_chunks = plan.num_stages * plan.num_chunks
    factors = data.draw(st.lists(st.floats(0.1, 1), min_size=num_chunks, max_size=num_chunks))
    timeline = simulate(
        schedule,
        times["forward"],
        times["backward"],
        weight_seconds=times["weights"],
        chunk_factors=factors,
        transfer_seconds=times["transfer"],
    )
    assert timeline.step_seconds == pytest.approx(longest_path(schedule, times, factors))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), seconds, seconds)
def test_equal_slices_take_as_long_under_terapipe_and_1f1b(
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


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(2, 4), seconds, seconds)
def test_chunks_divide_the_time_in_which_stages_wait(
    num_stages: int, num_sequences: int, more: int, num_chunks: int, forward: float, backward: float
):
    """(S + (P - 1) / v)(f + b), where there are as many slices as stages."""
    num_slices = -(-num_stages // num_sequences) + more
    slices = (1,) * num_sequences, ((1,) * num_slices,) * num_sequences
    plan = Plan(num_stages, *slices, schedule="interleaved", num_chunks=num_chunks)
    schedule, count = make_schedule(plan), num_sequences * num_slices
    factors = [1 / num_chunks] * (num_chunks * num_stages)
    times = [forward] * len(schedule.items), [backward] * len(schedule.items)
    timeline = simulate(schedule, *times, chunk_factors=factors)
    expected = (count + (num_stages - 1) / num_chunks) * (forward + backward)
    assert timeline.step_seconds == pytest.approx(expected)


@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 3), seconds)
def test_gradients_of_weights_fill_the_time_in_which_stages_wait(
    num_stages: int, more: int, num_slices: int, unit: float
):
    """S (f + b + w) + (P - 1) (f + b - w), as zero bubble's 1F1B (Qi et al. 2024, ZB-H1), where
    all three are as long and slices enough that none are left when the first ones come back.
    """
    num_sequences = 2 * num_stages + more
    slices = (1,) * num_sequences, ((1,) * num_slices,) * num_sequences
    schedule = make_schedule(Plan(num_stages, *slices, schedule="1f1b-deferred"))
    count = num_sequences * num_slices
    units = [unit] * count
    timeline = simulate(schedule, units, units, weight_seconds=units)
    assert timeline.step_seconds == pytest.approx((3 * count + num_stages - 1) * unit)
