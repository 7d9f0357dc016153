"""Ticks that are read from a trace, of events that were made up and of real runs."""

from pathlib import Path

import jax
import pytest

from support import runs, timeline_file
from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import one_forward_one_backward, terapipe
from tpipe_jax.planning.simulate import Box, Timeline
from tpipe_jax.reporting.measured_ticks import (
    Event,
    TickConditional,
    find_tick_conditionals,
    merged,
    stage_boxes,
    to_text,
)

pytestmark = pytest.mark.usefixtures("short_flags")

SCHEDULE = terapipe(Plan(2, (1,), ((5, 3),)))  # three ticks in each direction
LANES = [TickConditional("back", frozenset({"t.2"})), TickConditional("forth", frozenset({"t.1"}))]
EVENTS = [
    Event("forth", 1, 3),
    Event("t.1", 2, 3),
    Event("back", 3, 3),  # which has nothing to do in this tick
    Event("forth", 3.5, 6.5),
    Event("dot", 4, 5),
    Event("t.1", 6, 6.5),
    Event("forth", 6.75, 8),
    Event("t.1", 7, 8),
    Event("back", 10, 12),
    Event("t.2", 11, 12),
    Event("forth", 12, 12),
    Event("back", 12.5, 15),
    Event("t.2", 14, 15),
    Event("back", 15.5, 19),
    Event("t.2", 18, 19),
]


def test_work_lies_between_the_conditional_s_start_and_the_transfer():
    """Stage 0 idles in the last tick forward and in the first one backward."""
    first = [
        Box(0, 0, "forward", 1, 2),
        Box(0, 1, "forward", 3.5, 6),
        Box(0, 1, "backward", 12.5, 14),
    ]
    assert stage_boxes(EVENTS, LANES, SCHEDULE, 0) == [*first, Box(0, 0, "backward", 15.5, 18)]
    second = [
        Box(1, 0, "forward", 3.5, 6),
        Box(1, 1, "forward", 6.75, 7),
        Box(1, 1, "backward", 10, 11),
    ]
    assert stage_boxes(EVENTS[::-1], LANES, SCHEDULE, 1) == [
        *second,
        Box(1, 0, "backward", 12.5, 14),
    ]


def test_ticks_with_both_directions():
    """Two sequences on two stages: in ticks 1 and 2 there is work in both."""
    schedule = one_forward_one_backward(Plan(2, (1, 1), ((8,), (8,))))
    events = [
        Event(name, tick + after, tick + after + duration)
        for tick, names in enumerate(["f", "fb", "fb", "b"])
        for own, loop, transfer, after in (("f", "forth", "t.1", 0), ("b", "back", "t.2", 0.5))
        for name, after, duration in (
            [(loop, after, 0.4), (transfer, after + 0.25, 0.1)] if own in names else []
        )
    ]
    first = stage_boxes(events, LANES, schedule, 0)
    assert [(box.item, box.kind, box.start_seconds) for box in first] == [
        *[(0, "forward", 0), (1, "forward", 1)],
        *[(0, "backward", 2.5), (1, "backward", 3.5)],
    ]
    last = stage_boxes(events, LANES, schedule, 1)
    assert [(box.item, box.kind, box.start_seconds) for box in last] == [
        *[(0, "forward", 1), (1, "forward", 2)],
        *[(0, "backward", 1.5), (1, "backward", 2.5)],
    ]


@pytest.mark.parametrize(
    ("events", "lanes"),
    [([], LANES), (EVENTS[1:], LANES), (EVENTS[:-1], LANES), (EVENTS, LANES[:1])],
    ids=["no events", "no conditional", "a transfer less", "one lane"],
)
def test_events_that_are_not_of_a_step_give_nothing(
    events: list[Event], lanes: list[TickConditional]
):
    assert stage_boxes(events, lanes, SCHEDULE, 0) == []


TEXT = """\
%body.1 (p: f32[]) -> f32[] {
  %t.1 = f32[1]{0} collective-permute(%x), channel_id=1, metadata={op_name="jit/while/ppermute"}
  ROOT %t.2 = (f32[1]) collective-permute-start(%t.1), metadata={op_name="jit/ppermute"}
}

%other (p: f32[]) -> f32[] {
  ROOT %r = f32[1]{0} collective-permute(%x), channel_id=1, metadata={op_name="jit/reshard"}
}

%nothing (p: f32[]) -> f32[] {
  ROOT %r = f32[] parameter(0)
}

ENTRY %main (p: f32[]) -> f32[] {
  %cond.3 = (f32[]) conditional(%p, %a, %b), branch_computations={%other, %nothing}
  %cond.4 = (f32[]) conditional(%p, %a, %b), branch_computations={%nothing, %body.1}
  ROOT %cond.5 = (f32[]) conditional(%p, %a), true_computation=%body.1, false_computation=%nothing
}
"""


def test_a_lane_is_a_conditional_that_hands_on():
    """Not one in which XLA moves values about, as it may where operators are divided."""
    transfers = frozenset({"t.1", "t.2"})
    assert find_tick_conditionals(TEXT) == [
        TickConditional("cond.4", transfers),
        TickConditional("cond.5", transfers),
    ]


def test_boxes_of_all_processes_start_at_nought():
    texts = [to_text([Box(1, 0, "forward", 7.5, 8)]), to_text([Box(0, 0, "forward", 7, 7.25)])]
    boxes = Box(1, 0, "forward", 0.5, 1), Box(0, 0, "forward", 0, 0.25)
    assert merged(texts, 2) == Timeline(boxes, 1, 2)
    assert merged(texts, 3) is None  # a stage has none
    assert merged(["[]"], 1) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [MeshConfig(pipe=2), MeshConfig(data=2, pipe=2, model=2)], ids=str
)
def test_a_traced_step_is_in_the_timeline(sizes: MeshConfig, tmp_path: Path):
    """And stays there when the run goes on; losses are those of a run without."""
    config = runs.changed(runs.small_config(tmp_path), mesh=vars(sizes), train={"num_steps": 3})
    traced = runs.changed(config, train={"trace_step": 2})
    said = runs.run(traced, tmp_path / "traced")
    [line] = [line for line in said if "was traced" in line]
    assert line.startswith("step 2 was traced: ")
    timeline_file.check_measured(tmp_path / "traced", 2, 2, 3)
    runs.run(config, tmp_path / "plain")
    losses = [[line["loss"] for line in runs.metrics(tmp_path / n)] for n in ("traced", "plain")]
    assert losses[0] == losses[1]
    runs.run(runs.changed(traced, train={"num_steps": 4}), tmp_path / "traced")
    timeline_file.check_measured(tmp_path / "traced", 2, 2, 3)
    others = runs.changed(traced, train={"num_steps": 5}, plan={"token_slices": "8,8"})
    runs.run(others, tmp_path / "traced")
    assert "measured" not in (tmp_path / "traced" / "timeline.json").read_text()


def test_a_trace_that_cannot_be_taken_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Profile has already been started.")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    config = runs.changed(runs.small_config(tmp_path), train={"num_steps": 2, "trace_step": 1})
    said = runs.run(config, tmp_path / "run")
    assert "step 1 was traced: the trace does not show its ticks" in said
    assert said[-1].startswith("Trained 2 steps")


def test_of_a_short_run_the_last_step_is_traced(tmp_path: Path):
    config = runs.changed(runs.small_config(tmp_path), train={"num_steps": 2, "trace_step": 7})
    runs.run(config, tmp_path / "run")
    timeline_file.check_measured(tmp_path / "run", 2, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("why", ["one stage", "profiled"])
def test_some_steps_are_not_traced(why: str, tmp_path: Path):
    config = runs.changed(runs.small_config(tmp_path), train={"num_steps": 2, "trace_step": 2})
    if why == "one stage":
        config = runs.changed(config, mesh={"pipe": 1})
    said = runs.run(config, tmp_path / "run", profiled=range(2, 3) if why == "profiled" else None)
    assert not [line for line in said if "was traced" in line]
    is_said = "step 2 is profiled, so its ticks are not measured" in said
    assert is_said == (why == "profiled")
