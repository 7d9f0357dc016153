"""The trace of a schedule: what is in it, and that it is read as it was written."""

import json
from pathlib import Path

import pytest

from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import make_schedule, terapipe
from tpipe_jax.planning.simulate import simulate
from tpipe_jax.reporting.trace_file import (
    read_timeline,
    read_trace,
    trace_events,
    write_trace,
)


def test_a_trace_has_an_event_for_each_slice_and_direction_on_each_stage(tmp_path: Path):
    schedule = terapipe(Plan(2, (2, 1), ((5, 3), (8,))))
    timeline = simulate(schedule, [1.0, 1.1, 1.2], [2.0, 2.2, 2.4])
    kinds = enumerate(("predicted", "measured"))
    traces = [trace_events(kind, name, schedule, timeline) for kind, name in kinds]
    write_trace(tmp_path / "t.json", sum(traces, []))  # noqa: RUF017 - there are two
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["predicted", "stage 0", "stage 1", "measured", "stage 0", "stage 1"]
    for pid in (0, 1):
        for tid in (0, 1):
            own = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (pid, tid)]
            assert [e["cat"] for e in own] == ["forward"] * 3 + ["backward"] * 3
            names = ["2 x 5 at 0, 0", "1 x 8 at 2, 0", "2 x 3 at 0, 5"]
            assert [e["name"] for e in own] == names + names[::-1]
            assert [e["dur"] for e in own] == pytest.approx([1e6, 1.1e6, 1.2e6, 2.4e6, 2.2e6, 2e6])
    # Microseconds; stage 1 has the first slice when stage 0 has finished it.
    assert [e["ts"] for e in events if e["ph"] == "X"][:2] == [0, 1e6]
    assert [read_trace(tmp_path / "t.json", kind) for kind in (0, 1)] == traces


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": [1]}'])
def test_what_is_no_trace_has_no_events(text: str, tmp_path: Path):
    (tmp_path / "t.json").write_text(text)
    assert read_trace(tmp_path / "t.json", 0) == read_trace(tmp_path / "none.json", 0) == []


def test_a_timeline_is_read_as_it_was_written():
    plan = Plan(2, (1, 1), ((5, 3), (5, 3)), num_chunks=2, schedule="interleaved")
    schedule = make_schedule(plan)
    costs = [1.0 + 0.1 * i for i in range(len(schedule.items))]
    timeline = simulate(schedule, costs, costs, transfer_seconds=[0.5] * len(costs))
    found = read_timeline(trace_events(0, "a name", schedule, timeline), schedule)
    assert found
    assert found[0] == "a name"
    assert found[1].step_seconds == timeline.step_seconds
    assert found[1].num_stages == 2
    for box, other in zip(found[1].boxes, timeline.boxes, strict=True):
        assert (box.stage, box.item, box.kind) == (other.stage, other.item, other.kind)
        assert (box.start_seconds, box.stop_seconds) == pytest.approx(
            (other.start_seconds, other.stop_seconds)
        )


def test_events_of_other_slices_are_no_timeline():
    schedule = terapipe(Plan(2, (1,), ((5, 3),)))
    events = trace_events(0, "a", schedule, simulate(schedule, [1.0, 1.0], [1.0, 1.0]))
    assert read_timeline(events, schedule)
    assert read_timeline(events, terapipe(Plan(2, (1,), ((4, 4),)))) is None
    assert read_timeline([], schedule) is None
    assert read_timeline([e for e in events if e["ph"] == "X"], schedule) is None
