"""The picture and the trace of a schedule: what is on them."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from support.pictures import check_readable
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import terapipe
from tpipe_jax.planning.simulate import simulate
from tpipe_jax.reporting.timeline import draw_timeline, duration


def test_one_box_for_each_slice_and_direction_on_each_stage(tmp_path: Path, figures: list[Figure]):
    schedule = terapipe(Plan(3, (2, 1), ((5, 3), (8,))))
    forward, backward = [1.0, 1.1, 1.2], [2.0, 2.2, 2.4]
    timeline = simulate(schedule, forward, backward)
    draw_timeline(tmp_path / "a.png", schedule, timeline, "title")
    check_readable(figures[0], tmp_path / "a.png")
    axes = figures[0].axes[0]
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    widths = sorted(box.get_width() for box in boxes)
    assert widths == pytest.approx(sorted([*forward, *backward] * 3))
    hatched = {round(box.get_width(), 6) for box in boxes if box.get_hatch()}
    assert sorted(hatched) == pytest.approx(backward)
    for text, box in zip(axes.texts, boxes, strict=True):
        assert text.get_position() == pytest.approx(box.get_center())
    labels = [text.get_text() for text in axes.texts]
    assert labels.count("2 x 5") == labels.count("2 x 3") == labels.count("1 x 8") == 6
    assert axes.get_xlabel() == "time [s]\nin each box: sequences x tokens of its slice"
    # 9.9 s of work on each stage, and (P - 1)(1.2 + 2.4) s of waiting: equation 5 of TeraPipe.
    assert axes.get_title() == (
        "title\ncomputed, not measured: 17.1 s a step in the pipeline, "
        "stages are busy 58% of the time"
    )
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "stage 0",
        "stage 1",
        "stage 2",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (4.4e-4, "0.44 ms"),
        (0.0123456, "12.3 ms"),
        (0.9996, "1000 ms"),
        (9.9994, "9999 ms"),
        (9.9996, "10 s"),
        (123.4, "123 s"),
        (1234.5, "1234 s"),
    ],
)
def test_durations_have_a_unit_and_no_exponent(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("unit", "seconds", "end", "label"),
    [
        ("s", 0.004, 27.2, "time [ms]"),
        ("s", 4.0, 27.2, "time [s]"),
        ("GFLOP", 4.0, 100, "share of a step [%]"),
    ],
)
def test_an_axis_has_a_unit_that_a_person_knows(
    unit: str, seconds: float, end: float, label: str, tmp_path: Path, figures: list[Figure]
):
    """A step takes 3 forward passes and 2.5 + 1.3 of that length backward, 27.2 ms or s."""
    schedule = terapipe(Plan(2, (1,), ((5, 3),)))
    timeline = simulate(schedule, [seconds, seconds], [1.3 * seconds, 1.2 * seconds])
    draw_timeline(tmp_path / "a.png", schedule, timeline, "title", unit)
    axes = figures[0].axes[0]
    assert axes.get_xlim() == pytest.approx((0, end))
    assert axes.get_xlabel().splitlines()[0] == label
    assert (" a step in the pipeline" in axes.get_title()) == (unit == "s")


def test_labels_of_narrow_boxes_stand_within_them(tmp_path: Path, figures: list[Figure]):
    """In a picture that is wider, if need be."""
    widths = []
    for count in (8, 40):
        schedule = terapipe(Plan(2, (1,), ((128,) * count,)))
        timeline = simulate(schedule, [1.0] * count, [2.0] * count)
        draw_timeline(tmp_path / "a.png", schedule, timeline, "title")
        check_readable(figures[-1], tmp_path / "a.png")
        axes = figures[-1].axes[0]
        labels = [text for text in axes.texts if text.get_text() == "128"]
        assert len(labels) == 2 * 2 * count
        assert {text.get_rotation() for text in labels if text.get_rotation()} == {90} or count == 8
        for text, box in zip(labels, axes.patches, strict=True):
            inside, outside = text.get_window_extent(), box.get_window_extent()
            # A line of text has room for what hangs below it, which digits do not.
            assert inside.width < outside.width + 0.4 * text.get_fontsize() * figures[-1].dpi / 72
            assert inside.height < outside.height
        widths.append(figures[-1].get_figwidth())
    assert widths[0] == 12
    assert 12 < widths[1] <= 20


@pytest.mark.parametrize("num_stages", [2, 30])
def test_slices_too_narrow_for_labels_are_listed(
    num_stages: int, tmp_path: Path, figures: list[Figure]
):
    """Also if some are wide enough."""
    slices = (64,) * 100 + (56,) * 2 + (40,)
    schedule = terapipe(Plan(num_stages, (1,), (slices,)))
    timeline = simulate(schedule, [1.0] * 102 + [50.0], [1.0] * 103)
    draw_timeline(tmp_path / "a.png", schedule, timeline, "title")
    check_readable(figures[0], tmp_path / "a.png")
    axes = figures[0].axes[0]
    assert not axes.texts
    listed = "tokens of the slices, first to last: 64 (100 times), 56 (2 times), 40"
    assert axes.get_xlabel() == f"time [s]\n{listed}"
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["forward", "backward", "first slice", "last slice"]


def test_of_many_unlike_slices_some_are_listed(tmp_path: Path, figures: list[Figure]):
    slices = tuple(range(200, 0, -1))
    schedule = terapipe(Plan(2, (1,), (slices,)))
    timeline = simulate(schedule, [1.0] * len(slices), [1.0] * len(slices))
    draw_timeline(tmp_path / "a.png", schedule, timeline, "title")
    listed = figures[0].axes[0].get_xlabel().partition(": ")[2]
    assert listed == "200, 199, 198, ..., 2, 1"


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


def test_boxes_have_labels_beside_a_slower_measurement(tmp_path: Path, figures: list[Figure]):
    """Their axis ends with the longer step, so the picture must be wider than for one of them."""
    schedule = terapipe(Plan(2, (1,), ((128,) * 24,)))
    computed, measured = (simulate(schedule, [t] * 24, [2 * t] * 24) for t in (1.0, 1.5))
    draw_timeline(tmp_path / "a.png", schedule, computed, "title", measured=("name", measured))
    assert [len(axes.texts) for axes in figures[0].axes] == [96, 96]


@pytest.mark.parametrize("unit", ["s", "GFLOP"])
def test_what_was_measured_stands_below_to_the_same_scale(
    unit: str, tmp_path: Path, figures: list[Figure]
):
    schedule = terapipe(Plan(2, (1,), ((5, 3),)))
    computed = simulate(schedule, [1.0, 1.0], [1.0, 1.0])
    measured = simulate(schedule, [2.0, 1.0], [2.0, 1.0])
    named = "measured, step 7", measured
    draw_timeline(tmp_path / "a.png", schedule, computed, "title", unit, named)
    check_readable(figures[0], tmp_path / "a.png")
    above, below = figures[0].axes
    # 3 ticks of 1 s each way, then 2 ticks of 2 s and one of 1 s.
    assert above.get_xlim() == pytest.approx((0, 10 if unit == "s" else 100))
    assert below.get_xlim() == pytest.approx((0, 10))
    assert [max(p.get_x() + p.get_width() for p in a.patches) for a in (above, below)] == (
        pytest.approx([6 if unit == "s" else 100, 10])
    )
    assert below.get_title() == (
        "measured, step 7: 10 s a step in the pipeline, stages are busy 60% of the time"
    )
    assert above.get_title().startswith("title\ncomputed, not measured: ")
    assert {text.get_text() for axes in (above, below) for text in axes.texts} == {"5", "3"}
