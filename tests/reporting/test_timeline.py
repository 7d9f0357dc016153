"""The picture and the trace of a schedule: what is on them."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import terapipe
from tpipe_jax.planning.simulate import simulate
from tpipe_jax.reporting.timeline import draw_timeline, read_trace, trace_events, write_trace


def test_one_box_for_each_slice_and_direction_on_each_stage(tmp_path: Path, figures: list[Figure]):
    schedule = terapipe(Plan(3, (2, 1), ((5, 3), (8,))))
    forward, backward = [1.0, 1.1, 1.2], [2.0, 2.2, 2.4]
    timeline = simulate(schedule, forward, backward)
    draw_timeline(tmp_path / "a.png", schedule, timeline, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    axes = figures[0].axes[0]
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    widths = sorted(box.get_width() for box in boxes)
    assert widths == pytest.approx(sorted([*forward, *backward] * 3))
    hatched = {round(box.get_width(), 6) for box in boxes if box.get_hatch()}
    assert sorted(hatched) == pytest.approx(backward)
    labels = [text.get_text() for text in axes.texts]
    assert labels.count("2 x 5") == labels.count("2 x 3") == labels.count("1 x 8") == 6
    # 9.9 s of work on each stage, and (P - 1)(1.2 + 2.4) s of waiting: equation 5 of TeraPipe.
    assert "busy 58% of the time" in axes.get_title()
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "stage 0",
        "stage 1",
        "stage 2",
    ]


def test_many_stages_are_one_collection(tmp_path: Path, figures: list[Figure]):
    """Thousands of patches would take seconds to draw."""
    schedule = terapipe(Plan(30, (1,), ((5, 3),)))
    timeline = simulate(schedule, [1.0, 1.0], [1.0, 1.0])
    draw_timeline(tmp_path / "a.png", schedule, timeline, "title")
    axes = figures[0].axes[0]
    assert len(axes.patches) == 0
    (collection,) = axes.collections
    assert len(collection.get_paths()) == 2 * 2 * 30
    assert len(axes.get_yticks()) <= 24


def test_sequences_are_left_out_where_slices_have_one_each(tmp_path: Path, figures: list[Figure]):
    schedule = terapipe(Plan(2, (1,), ((5, 3),)))
    timeline = simulate(schedule, [1.0, 1.0], [1.0, 1.0])
    draw_timeline(tmp_path / "a.png", schedule, timeline, "title")
    assert {text.get_text() for text in figures[0].axes[0].texts} == {"5", "3"}


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
